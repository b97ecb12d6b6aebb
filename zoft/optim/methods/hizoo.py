"""HiZOO: directions scaled by an estimate of the diagonal of the curvature (arXiv 2402.15173, algorithm 1)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from zoft.noise.direction import Direction
from zoft.noise.table import Where, at, chunk_length
from zoft.optim.core.derived import Derived
from zoft.optim.core.method import Method
from zoft.optim.core.oracle import Oracle
from zoft.optim.core.parts import Directions, Host
from zoft.optim.core.record import Measured, Step, StepRecord, StepStart
from zoft.weights.blocks import Block


class Curvature(Directions):
    """``u = z / sqrt(H)``; after the step ``H <- (1 - alpha) H + alpha |dL (H z^2 - H)| / (2 eps^2)``.

    ``dL = L(theta + eps u) + L(theta - eps u) - 2 L(theta)``: three forward passes with one probe. H starts at 1 and
    stays within ``floor .. ceiling``. Probe and update have the same H. State: H in float32, one number a weight: in
    half precision the published updates of H round to nothing. With ``alpha = 0`` it is MeZO bit for bit.

    >>> Curvature(alpha=1e-6).centred
    True
    """

    stateful: ClassVar[bool] = True

    alpha: float = Field(1e-8, ge=0, le=1, description="share of the new curvature in a step")
    centred: bool = Field(True, description="H z^2 - H, whose mean is the curvature; the published code has H z^2")
    floor: float = Field(1e-4, gt=0, description="least H")
    ceiling: float = Field(1e4, gt=0, description="greatest H")

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return the losses at both ends of every probe, and ``centre``, the loss at ``theta``."""
        centre = oracle()
        return replace(super().measure(host, oracle, start), extra={"centre": centre})

    def forwards(self, probes: int) -> int:
        """Return two for every probe, and one at ``theta``."""
        return 2 * probes + 1

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the direction of one probe."""
        z = host.isotropic(step, probe)
        if not self.alpha:
            return z

        def scaled(block: Block, where: Where) -> torch.Tensor:
            return z.u(block, where) / at(self._h(host, block), block, where).sqrt()

        return Derived(scaled, z.idle)

    def learn(self, host: Host, record: StepRecord) -> None:
        """Move H."""
        if not self.alpha:
            return
        (centre,) = record.numbers("centre")
        bends = [(pos + neg - 2 * centre) / (2 * record.eps**2) for pos, neg in record.losses]
        directions = [host.isotropic(record, probe, {}) for probe in range(len(bends))]
        for block in host.probed:
            h = self._h(host, block).view(-1)
            for lo in range(0, block.size, chunk_length(block)):
                piece = slice(lo, min(block.size, lo + chunk_length(block)))
                squares = [direction.u(block, piece).square() for direction in directions]
                h[piece] = self._moved(h[piece], bends, squares)

    def _moved(self, h: torch.Tensor, bends: list[float], squares: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(h)
        for bend, square in zip(bends, squares, strict=True):
            total.add_((h * (square - 1 if self.centred else square) * bend).abs())
        return (h * (1 - self.alpha) + total * (self.alpha / len(bends))).clamp_(self.floor, self.ceiling)

    @staticmethod
    def _h(host: Host, block: Block) -> torch.Tensor:
        return host.remembered("curvature", block, fill=1.0)


METHOD = Method(
    "hizoo",
    "directions scaled by a diagonal curvature",
    "arXiv 2402.15173",
    parts=(Curvature,),
)
