"""Seeded noise: ``z`` of a block is a function of (run seed, step, probe, block name), and is never stored.

Drawing fresh normal numbers costs several times the forward passes on a CPU, so ``z`` is read from a table of
standard normal numbers at random places, as in evolution strategies (arXiv 1703.03864, section 2.3). A block is cut
into chunks of fixed length; each chunk has its own place and its own random sign, so that ``E[z] = 0`` and chunks are
uncorrelated exactly, and the numbers of one chunk up to the sample correlation of the table.

Version "table-2", which a journal records:

* table: ``2**21`` float32 numbers from numpy's Philox keyed by the run seed, standardised in float64, rounded to
  bfloat16. So float32, bfloat16 and CUDA runs see the same ``z``; the table takes 4 MB beside a bfloat16 model, 8 MB
  beside a float32 one.
* chunk: the most whole rows (last dimension) that fit ``2**16`` numbers; ``2**16`` numbers where one row does not fit.
* place: chunk k reads the k-th little-endian 32-bit word ``w`` of SHAKE-128(``"seed/step/probe/name"``); the sign is
  its highest bit, the offset the other 31 bits modulo the number of places.
"""

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from zoft.blocks import Block

NOISE_VERSION = "table-2"
TABLE_SIZE = 2**21
CHUNK = 2**16

Where = slice | torch.Tensor  # a flat range within one chunk of a block, or rows of a 2-D block


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that updates of weights of ``dtype`` are computed in: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at(tensor: torch.Tensor, block: Block, where: Where) -> torch.Tensor:
    """Return the numbers of ``tensor``, which has as many as ``block``, that stand at ``where``."""
    flat = tensor.detach().view(-1)
    return flat[where] if isinstance(where, slice) else flat.view(-1, block.shape[-1])[where]


def normal_numbers(
    seed: int,
    key: str,
    shape: tuple[int, ...],
    device: torch.device,
    table_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return standard normal float32 numbers of ``shape``, a function of ``seed`` and ``key``: for small factors.

    Read from the table (kept in ``table_dtype``, which changes no number) like ``z``, in chunks of ``CHUNK`` numbers.

    >>> normal_numbers(0, "0/right/w", (5, 2), torch.device("cpu")).shape
    torch.Size([5, 2])
    """
    size = math.prod(shape)
    table = noise_table(seed, table_dtype, device)
    out = torch.empty(size, dtype=torch.float32, device=device)
    offsets, signs = places(f"{seed}/{key}", -(-size // CHUNK), TABLE_SIZE)
    for chunk, (offset, sign) in enumerate(zip(offsets, signs, strict=True)):
        lo = chunk * CHUNK
        hi = min(size, lo + CHUNK)
        torch.mul(table[offset : offset + hi - lo].float(), int(sign), out=out[lo:hi])
    return out.view(shape)


@functools.lru_cache(maxsize=4)
def noise_table(seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the run's ``(TABLE_SIZE,)`` standard normal numbers; values representable in bfloat16.

    Drawn twice, chunk by chunk, so that no float32 copy of the table is ever in memory: for mean and variance, then for
    the numbers.
    """
    total = squares = 0.0
    for drawn in _table_chunks(seed):
        total, squares = total + drawn.sum(), squares + np.square(drawn).sum()
    mean = total / TABLE_SIZE
    deviation = np.sqrt(squares / TABLE_SIZE - mean**2)
    table = torch.empty(TABLE_SIZE, dtype=dtype, device=device)
    for place, drawn in zip(range(0, TABLE_SIZE, CHUNK), _table_chunks(seed), strict=True):
        table[place : place + CHUNK] = torch.from_numpy((drawn - mean) / deviation).to(torch.bfloat16)
    return table


def _table_chunks(seed: int) -> Iterator[np.ndarray]:
    """The float32 numbers of the table in their order, a chunk at a time, as float64."""
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    for _ in range(TABLE_SIZE // CHUNK):
        yield generator.standard_normal(CHUNK, dtype=np.float32).astype(np.float64)


def chunk_length(block: Block) -> int:
    """Return how many numbers a chunk of ``block`` holds.

    >>> chunk_length(Block("embedding", torch.nn.Parameter(torch.empty(200, 576))))
    65088
    """
    width = block.shape[-1] if block.shape else 1
    return CHUNK // width * width if width <= CHUNK else CHUNK


def places(key: str, chunks: int, table_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each chunk reads a table, ``(chunks,)`` offsets, and its ``(chunks,)`` signs +1 or -1.

    A pure function of ``key``; every place leaves room for a whole chunk.
    """
    words = np.frombuffer(hashlib.shake_128(key.encode()).digest(4 * chunks), dtype="<u4").astype(np.int64)
    return (words & 0x7FFFFFFF) % (table_size - CHUNK), 1 - 2 * (words >> 31)


class Direction:
    """The direction ``u = s z`` of one probe for every block, read piece by piece.

    ``scales`` holds the normalised scale ``s`` of blocks by name; a block that it does not name has ``s = 1``.
    ``table_dtype`` is the dtype most weights have; pieces for blocks of another dtype are converted as they are read.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        probe: int = 0,
        scales: Mapping[str, float] | None = None,
        table_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seed, self.step, self.probe = seed, step, probe
        self.scales = scales or {}
        self.table_dtype = table_dtype
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def pieces(self, block: Block, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, float]]:
        """Yield ``(lo, hi, z, factor)`` that cover flat range ``start:stop`` of ``block``; there ``u = factor * z``.

        ``z`` is a read-only view of the table in ``table_dtype``, on the block's device.
        """
        length, offsets, signs = self._layout(block)
        table = noise_table(self.seed, self.table_dtype, block.parameter.device)
        scale = self.scales.get(block.name, 1.0)
        for chunk in range(start // length, -(-stop // length)):
            lo, hi = max(start, chunk * length), min(stop, (chunk + 1) * length)
            place = int(offsets[chunk]) + lo - chunk * length
            yield lo, hi, table[place : place + hi - lo], scale * int(signs[chunk])

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write ``theta + eps * u`` for the flat range ``start:stop`` into the flat ``out`` and return it.

        One rounding to the dtype of ``theta``; the stored weights are only read.
        """
        theta = block.parameter.detach().view(-1)
        for lo, hi, z, factor in self.pieces(block, start, stop):
            torch.add(theta[lo:hi], z.to(theta.dtype), alpha=eps * factor, out=out[lo - start : hi - start])
        return out

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``theta + eps * u`` at ``rows`` (any shape, integer) of a 2-D block: ``(*rows.shape, width)``.

        The same rows of `perturb`, up to one rounding in half precision; only these rows are read.
        """
        theta = block.parameter.detach()
        width = block.shape[-1]
        if width > CHUNK:  # a row spans several chunks: take it as a range
            flat = [self._row(block, int(row), eps) for row in rows.flatten()]
            return torch.stack(flat).view(*rows.shape, width)
        z, factor = self.rows(block, rows.flatten())
        perturbed = torch.add(theta[rows.flatten()], z.to(theta.dtype), alpha=eps * factor)
        return perturbed.view(*rows.shape, width)

    def rows(self, block: Block, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return ``z`` at the flat ``rows`` of a 2-D block, ``(rows, width)``, and the factor: ``u = factor * z``."""
        width = block.shape[-1]
        length, offsets, signs = self._layout(block)
        index = rows.cpu().numpy() * width
        chunk = index // length
        device, dtype = block.parameter.device, block.parameter.dtype
        place = torch.from_numpy(offsets[chunk] + index % length).to(device)
        sign = torch.from_numpy(signs[chunk].astype(np.float32)).to(device=device, dtype=dtype)
        table = noise_table(self.seed, self.table_dtype, device)
        windows = table.as_strided((TABLE_SIZE - width + 1, width), (1, 1))
        return windows[place].to(dtype) * sign[:, None], self.scales.get(block.name, 1.0)

    def u(self, block: Block, where: Where) -> torch.Tensor:
        """Return ``u`` at ``where``, in float32 (float64 for float64 weights): a piece of one chunk, or rows."""
        if isinstance(where, slice):
            ((_, _, z, factor),) = self.pieces(block, where.start, where.stop)
        else:
            z, factor = self.rows(block, where)
        return z.to(work_dtype(block.parameter.dtype)) * factor

    def idle(self, block: Block) -> bool:
        """Whether ``u`` is zero on the whole of ``block``: nothing is perturbed there."""
        return self.scales.get(block.name) == 0.0

    def values(self, block: Block) -> torch.Tensor:
        """Return the whole ``u`` of ``block`` in float32; for tests and small blocks."""
        out = torch.empty(block.size, dtype=torch.float32, device=block.parameter.device)
        for lo, hi, z, factor in self.pieces(block, 0, block.size):
            torch.mul(z.float(), factor, out=out[lo:hi])
        return out.view(block.shape)

    def _row(self, block: Block, row: int, eps: float) -> torch.Tensor:
        width = block.shape[-1]
        return self.perturb(block, row * width, (row + 1) * width, eps, block.parameter.new_empty(width))

    def _layout(self, block: Block) -> tuple[int, np.ndarray, np.ndarray]:
        length = chunk_length(block)
        if block.name not in self._places:
            chunks = -(-block.size // length)
            key = f"{self.seed}/{self.step}/{self.probe}/{block.name}"
            self._places[block.name] = places(key, chunks, TABLE_SIZE)
        return length, *self._places[block.name]
