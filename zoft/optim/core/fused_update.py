"""The update of MeZO's rule on all blocks of a GPU in one kernel, with the bits of the plain sweep."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from zoft.noise import fused
from zoft.noise.direction import NoiseDirection
from zoft.noise.rounding import Dither, dither_table
from zoft.noise.table import chunk_length, noise_table, row_length
from zoft.optim.core.pieces import Term
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block
from zoft.weights.dtypes import HALF


class _Kind(NamedTuple):
    """Blocks of one kind share a launch."""

    device: torch.device
    dtype: torch.dtype
    probes: int


def dither_key(block: Block, record: StepRecord) -> str:
    """Return the key of the numbers that round the update of ``block`` by ``record``."""
    return f"{record.seed}/{record.step}/dither/{block.name}"


def serves(block: Block, terms: Sequence[Term]) -> bool:
    """Return whether the kernel can update ``block`` along ``terms``: it reads noise from the table alone."""
    isotropic = all(isinstance(direction, NoiseDirection) for _, direction in terms)
    return isotropic and fused.supports(block.parameter.detach())


class FusedUpdate:
    """Blocks that are updated in one launch for each device, dtype and number of probes."""

    def __init__(self, record: StepRecord, table_dtype: torch.dtype) -> None:
        self._record, self._table_dtype = record, table_dtype
        self._chunks: dict[_Kind, list[fused.Chunk]] = {}

    def add(self, block: Block, terms: Sequence[Term], lr: float, decay: float) -> None:
        """Add ``block``, to be moved along ``terms``, none of them idle there."""
        weights = block.parameter.detach()
        kind = _Kind(weights.device, weights.dtype, len(terms))
        self._chunks.setdefault(kind, []).extend(self._chunks_of(block, terms, lr, decay))

    def _chunks_of(self, block: Block, terms: Sequence[Term], lr: float, decay: float) -> list[fused.Chunk]:
        weights, length = block.parameter.detach(), chunk_length(block)
        starts = range(0, block.size, length)
        dithers = [(0, 0)] * len(starts)
        if weights.dtype in HALF:
            dither = Dither(block, dither_key(block, self._record), self._record.seed)
            dithers = list(zip(dither.layout.offsets, dither.layout.strides, strict=True))
        steps = [
            direction.steps(block, lr * coefficient)
            for coefficient, direction in terms
            if isinstance(direction, NoiseDirection)
        ]
        return [
            fused.Chunk(
                address=weights.data_ptr() + start * weights.itemsize,
                size=min(block.size - start, length),
                width=row_length(block),
                keep=1 - decay,
                dither=dithers[k],
                steps=tuple(of_chunks[k] for of_chunks in steps),
            )
            for k, start in enumerate(starts)
        ]

    def run(self) -> None:
        """Move the blocks that were added."""
        for kind, chunks in self._chunks.items():
            table = noise_table(self._record.seed, self._table_dtype, kind.device)
            dither = dither_table(self._record.seed, kind.device) if kind.dtype in HALF else None
            fused.update(chunks, kind.dtype, table, dither)
