"""Stochastic rounding of float32 numbers to half precision, by seeded draws."""

import functools

import numpy as np
import torch

from zoft.noise.table import chunk_length, layout, row_length
from zoft.weights.blocks import Block

DITHER_SIZE = 2**18
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32 mantissa
_SMALLEST_NORMAL = 2.0**-14  # of float16; below it the spacing no longer shrinks


@functools.lru_cache(maxsize=16)  # a run on many GPUs has one on each
def dither_table(seed: int, device: torch.device) -> torch.Tensor:
    """Return the run's ``(DITHER_SIZE,)`` int32 numbers, uniform on 0 .. 65535: numpy's Philox keyed by the seed.

    Two bytes would hold them, but widening them at every use costs a third of the rounding.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
    table = generator.integers(0, 2**16, DITHER_SIZE, dtype=np.int32)
    return torch.from_numpy(table).to(device)


class Dither:
    """Seeded uniform numbers that round one block once, read like the noise with an offset and a stride per chunk.

    Rows may overlap: a number of the table may round several weights of a chunk, but never two of a row. ``key``
    identifies the update, ``seed`` the table.
    """

    def __init__(self, block: Block, key: str, seed: int) -> None:
        width = row_length(block)
        rows = -(-min(chunk_length(block), block.size) // width)
        strides = max(1, (DITHER_SIZE // 2 - width) // rows)
        self.layout = layout(key, block, DITHER_SIZE, (1, strides))
        self.table = dither_table(seed, block.parameter.device)

    def round_(self, values: torch.Tensor, lo: int, out: torch.Tensor) -> None:
        """Round the float32 ``values``, at position ``lo`` of the block, into the flat ``out`` of half precision.

        ``values`` is used as working memory and is not valid afterwards.
        """
        for start, stop, dither, _ in self.layout.windows(self.table, lo, lo + values.numel()):
            piece = values[start - lo : stop - lo].view(dither.shape)
            out[start - lo : stop - lo].view(dither.shape).copy_(_round_(piece, dither, out.dtype))


def round_stochastically(values: torch.Tensor, dither: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 ``values`` to ``dtype`` (bfloat16 or float16), up or down with the probability that keeps the mean.

    ``dither`` are as many int32 numbers, uniform on 0 .. 65535. A number that ``dtype`` can represent is unchanged.
    ``values`` is used as working memory and is not valid afterwards.

    >>> x = torch.full((65536,), 1 + 2.0**-9)  # a quarter of the way from 1 to the next bfloat16, 1 + 2**-7
    >>> y = round_stochastically(x, torch.arange(65536, dtype=torch.int32), torch.bfloat16)
    >>> y.unique().tolist(), y.float().mean().item()
    ([1.0, 1.0078125], 1.001953125)
    """
    return _round_(values, dither, dtype).to(dtype)


def _round_(values: torch.Tensor, dither: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round ``values`` in place to float32 numbers that ``dtype`` can represent; return them."""
    bits = _DROPPED_BITS[dtype]
    if bits < 16:
        dither = dither >> (16 - bits)
    if dtype is torch.float16:
        shift = torch.copysign((values.abs() < _SMALLEST_NORMAL) * _SMALLEST_NORMAL, values)
        return _dithered(values.add_(shift), dither, bits).sub_(shift)
    return _dithered(values, dither, bits)


def _dithered(values: torch.Tensor, dither: torch.Tensor, bits: int) -> torch.Tensor:
    """Add ``dither`` below the last kept bit of the magnitude, then truncate the ``bits`` below it."""
    values.view(torch.int32).add_(dither).bitwise_and_(-1 << bits)
    return values
