"""The update of MeZO's rule on all blocks of a GPU in one kernel, with the bits of the plain sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from zoft.noise import fused
from zoft.noise.direction import Direction
from zoft.noise.rounding import Dither, dither_table
from zoft.noise.table import chunk_length, noise_table, row_length
from zoft.optim.core.parts import Rule, Term
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block
from zoft.weights.dtypes import HALF

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer

_Kind = tuple[torch.device, torch.dtype, int]


def dither_key(block: Block, record: StepRecord) -> str:
    """Return what names the numbers that round the update of ``block`` by ``record``."""
    return f"{record.seed}/{record.step}/dither/{block.name}"


class Together:
    """Blocks that are updated together, one launch for each device, dtype and number of probes."""

    def __init__(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        self._optimizer, self._record = optimizer, record
        self._plain = type(optimizer.rule).update is Rule.update and not optimizer.rule.momentum
        self._chunks: dict[_Kind, list[fused.Chunk]] = {}

    def take(self, block: Block, terms: Sequence[Term], lr: float, decay: float) -> bool:
        """Take ``block``, to be moved as `ZOOptimizer.update_block` would; False where it has to do that."""
        weights = block.parameter.detach()
        # Directions of one step and probe read one table; a subclass makes its own numbers.
        isotropic = all(type(direction) is Direction for _, direction in terms)
        if not (self._plain and isotropic and fused.serves(weights) and self._optimizer.master(block) is None):
            return False
        terms = [(coefficient, direction) for coefficient, direction in terms if not direction.idle(block)]
        if self._optimizer.moves(terms, decay):
            self._chunks.setdefault((weights.device, weights.dtype, len(terms)), []).extend(
                self._chunks_of(block, terms, lr, decay)
            )
        return True

    def _chunks_of(self, block: Block, terms: Sequence[Term], lr: float, decay: float) -> list[fused.Chunk]:
        weights, length = block.parameter.detach(), chunk_length(block)
        starts = range(0, block.size, length)
        dithers = [(0, 0)] * len(starts)
        if weights.dtype in HALF:
            dither = Dither(block, dither_key(block, self._record), self._record.seed)
            dithers = list(zip(dither.layout.offsets, dither.layout.strides, strict=True))
        steps = [direction.steps(block, lr * coefficient) for coefficient, direction in terms]
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

    def update(self) -> None:
        """Move the blocks that were taken."""
        for (device, dtype, _), chunks in self._chunks.items():
            table = noise_table(self._record.seed, self._optimizer.table_dtype, device)
            dither = dither_table(self._record.seed, device) if dtype in HALF else None
            fused.update(chunks, dtype, table, dither)
