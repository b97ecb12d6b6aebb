"""Noise table: ``z`` of a block is a function of (run seed, step, probe, block name) and is never stored.

Drawing fresh normal numbers on a CPU costs several times the forward passes, so ``z`` is read from a table of standard
normal numbers at random offsets, as in evolution strategies (arXiv 1703.03864, section 2.3). A block is split into
chunks, and each chunk has its own offset, stride and sign: its rows (last dimension) are read from the offset on, one
stride apart. So a layer of any shape takes one or two calls, no number is read twice in a chunk, ``E[z] = 0``, and two
chunks are exactly uncorrelated. Since the stride is drawn, the distance between two rows of a chunk differs in every
step, so rows are uncorrelated, too, up to the sample correlation of the table; so are numbers of one row.

Version "table-3", which a journal records:

* table: ``2**21`` float32 numbers from numpy's Philox keyed by the run seed, standardised in float64, rounded to
  bfloat16. So float32, bfloat16 and CUDA runs see the same ``z``; the table takes 4 MB for a bfloat16 model, 8 MB
  for a float32 one.
* chunk: as many whole rows of ``w`` numbers as fit into ``2**19``, at most ``2**16`` of them. A block with rows of
  more than ``2**16`` numbers is read flat, in chunks of one row of ``2**16``.
* place: chunk k reads the k-th two little-endian 32-bit words of SHAKE-128(``"seed/step/probe/name"``). The sign is the
  highest bit of the first, the stride ``w`` plus the second modulo ``w``, the offset the other 31 bits of the first
  modulo the number of offsets that leave room for the rows of the first chunk.
"""

import functools
import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from zoft.weights.blocks import Block

NOISE_VERSION = "table-3"
TABLE_SIZE = 2**21
CHUNK = 2**19
ROW = 2**16  # maximum length of a row (a block with longer rows is read flat), and of rows in a chunk

Where = slice | torch.Tensor  # a flat range within one chunk of a block, or rows of a 2-D block


def at(tensor: torch.Tensor, block: Block, where: Where) -> torch.Tensor:
    """Return the numbers of ``tensor``, which has the size of ``block``, at ``where``."""
    flat = tensor.detach().view(-1)
    return flat[where] if isinstance(where, slice) else flat.view(-1, block.shape[-1])[where]


def normal_numbers(
    seed: int,
    key: str,
    shape: tuple[int, ...],
    device: torch.device,
    table_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return standard normal float32 numbers of ``shape`` for small factors, a function of ``seed`` and ``key``.

    They are read from the table (in ``table_dtype``, which does not change the numbers) in rows of ``ROW``.

    >>> normal_numbers(0, "0/right/w", (5, 2), torch.device("cpu")).shape
    torch.Size([5, 2])
    """
    size = math.prod(shape)
    table = noise_table(seed, table_dtype, device)
    out = torch.empty(size, dtype=torch.float32, device=device)
    offsets, signs = places(f"{seed}/{key}", -(-size // ROW), TABLE_SIZE)
    for row, (offset, sign) in enumerate(zip(offsets, signs, strict=True)):
        lo = row * ROW
        hi = min(size, lo + ROW)
        torch.mul(table[offset : offset + hi - lo].float(), int(sign), out=out[lo:hi])
    return out.view(shape)


def noise_table(seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the run's ``(TABLE_SIZE,)`` standard normal numbers; values representable in bfloat16."""
    tables = _tables(seed)
    if (dtype, device) not in tables:
        tables[dtype, device] = _make_table(seed, dtype, device)
    return tables[dtype, device]


@functools.lru_cache(maxsize=2)
def _tables(seed: int) -> dict[tuple[torch.dtype, torch.device], torch.Tensor]:
    """Return the tables of a seed by dtype and device."""
    return {}


def forget_tables() -> None:
    """Free the tables and cached layouts; they are made again when they are read next."""
    _tables.cache_clear()
    _layout.cache_clear()


def _make_table(seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the table, drawn twice piece by piece to avoid a float32 copy: first for the moments, then the numbers."""
    total = squares = 0.0
    for drawn in _table_rows(seed):
        total, squares = total + drawn.sum(), squares + np.square(drawn).sum()
    mean = total / TABLE_SIZE
    deviation = np.sqrt(squares / TABLE_SIZE - mean**2)
    table = torch.empty(TABLE_SIZE, dtype=dtype, device=device)
    for place, drawn in zip(range(0, TABLE_SIZE, ROW), _table_rows(seed), strict=True):
        table[place : place + ROW] = torch.from_numpy((drawn - mean) / deviation).to(torch.bfloat16)
    return table


def _table_rows(seed: int) -> Iterator[np.ndarray]:
    """Yield the float32 numbers of the table in order, ``ROW`` at a time, as float64."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    for _ in range(TABLE_SIZE // ROW):
        yield generator.standard_normal(ROW, dtype=np.float32).astype(np.float64)


def row_length(block: Block) -> int:
    """Return the length of the rows in which ``block`` is read: its last dimension, at most ``ROW``."""
    return min(block.shape[-1] if block.shape else 1, ROW)


def chunk_length(block: Block) -> int:
    """Return the number of weights in a chunk of ``block``; updates also go chunk by chunk.

    >>> chunk_length(Block("embedding", torch.nn.Parameter(torch.empty(2000, 576))))
    524160
    """
    width = block.shape[-1] if block.shape else 1
    return min(CHUNK // width, ROW) * width if width <= ROW else ROW


def places(key: str, rows: int, table_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the offset of each row in a table, ``(rows,)``, and its sign +1 or -1, ``(rows,)``.

    A pure function of ``key``; every offset leaves room for ``ROW`` numbers.
    """
    words = np.frombuffer(hashlib.shake_128(key.encode()).digest(4 * rows), dtype="<u4").astype(np.int64)
    return (words & 0x7FFFFFFF) % (table_size - ROW), 1 - 2 * (words >> 31)


class Layout(NamedTuple):
    """Positions of a block's chunks in a table: row r of chunk k is at ``offsets[k] + r * strides[k]``."""

    width: int
    length: int
    offsets: Sequence[int]
    strides: Sequence[int]
    signs: Sequence[int]

    def windows(self, table: torch.Tensor, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, int]]:
        """Yield pieces ``(lo, hi, numbers, sign)`` that cover the flat range ``start:stop`` of the block.

        ``numbers`` is a view of the table, ``(rows, width)``: whole rows of one chunk, or a part of one row.
        """
        lo = start
        while lo < stop:
            chunk, within = divmod(lo, self.length)
            row, column = divmod(within, self.width)
            rows = (min(stop, (chunk + 1) * self.length) - lo) // self.width
            if column or not rows:  # a part of a row
                rows, width = 1, min(stop - lo, self.width - column)
            else:
                width = self.width
            stride = self.strides[chunk]
            place = self.offsets[chunk] + row * stride + column
            hi = lo + rows * width
            yield lo, hi, table.as_strided((rows, width), (stride, 1), place), self.signs[chunk]
            lo = hi


def layout(key: str, block: Block, table_size: int, strides: tuple[int, int]) -> Layout:
    """Return the positions of the chunks of ``block`` in a table, a pure function of ``key`` and the block's shape.

    ``strides`` holds the smallest stride and the number of strides to draw from.
    """
    return _layout(key, row_length(block), chunk_length(block), block.size, table_size, strides)


@functools.lru_cache(maxsize=2048)  # an update uses the layouts of its measurement
def _layout(key: str, width: int, length: int, size: int, table_size: int, strides: tuple[int, int]) -> Layout:
    rows, chunks = -(-min(length, size) // width), -(-size // length)
    # Plain integers are faster than numpy here: most blocks have one or two chunks.
    words = struct.unpack(f"<{2 * chunks}I", hashlib.shake_128(key.encode()).digest(8 * chunks))
    chosen = [strides[0] + word % strides[1] for word in words[1::2]]
    offsets = [
        (word & 0x7FFFFFFF) % (table_size + 1 - (rows - 1) * stride - width)
        for word, stride in zip(words[::2], chosen, strict=True)
    ]
    return Layout(width, length, offsets, chosen, [1 - 2 * (word >> 31) for word in words[::2]])
