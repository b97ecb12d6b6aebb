"""ZO-LDSD: the mean of the directions is learned while the run goes on (arXiv 2602.13659)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
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


class LearnedMean(Directions):
    """Of K candidates ``v = mu + sigma z`` the one with the lowest ``L(theta + eps v)`` is probed and stepped along.

    ``mu <- mu - rate / (K sigma^2) sum_k c_k (v_k - mu)`` with the leave-one-out advantage ``c_k = (K f_k - sum f) /
    (K - 1)``: REINFORCE on the candidates that were evaluated, each drawn again from its own seed. K is ``probes``; the
    evaluation of the winner is one end of its probe, so that a step takes K + 1 forward passes. State: mu, one number
    a weight. With K = 1 it is MeZO bit for bit, and with ``mean_rate = 0`` it is best-of-K MeZO.

    >>> LearnedMean().mean_rate
    0.04
    """

    stateful: ClassVar[bool] = True

    sigma: float = Field(1.0, gt=0, description="spread of the candidates around their mean")
    mean_rate: float = Field(4e-2, ge=0, description="learning rate of the mean")

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return the losses of the candidates, and of the best one at its other end, too."""
        found = tuple(oracle(self._candidate(host, start, k), start.eps) for k in range(host.probes))
        best = int(np.argmin([loss if np.isfinite(loss) else np.inf for loss in found]))
        other = oracle(self._candidate(host, start, best), -start.eps)
        return Measured(((found[best], other),), extra={"candidates": found, "best": float(best)})

    def forwards(self, probes: int) -> int:
        """Return one for every candidate, and one more for the best."""
        return probes + 1

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the best candidate, the only probe of a measured step."""
        assert isinstance(step, StepRecord)  # which candidate is best is measured
        return self._candidate(host, step, int(step.numbers("best")[0]))

    def _learns(self, count: int) -> bool:
        return bool(self.mean_rate) and count > 1

    def _candidate(self, host: Host, step: Step, number: int) -> Direction:
        z = host.isotropic(step, number)
        if not self._learns(host.probes) and self.sigma == 1:
            return z

        def v(block: Block, where: Where) -> torch.Tensor:
            return z.u(block, where) * self.sigma + at(host.remembered("mean", block), block, where)

        return Derived(v, z.idle)

    def learn(self, host: Host, record: StepRecord) -> None:
        """Move the mean."""
        losses = record.numbers("candidates")
        count = len(losses)
        if not self._learns(count):
            return
        advantages = [(count * loss - sum(losses)) / (count - 1) for loss in losses]
        scales = host.named_scales(record)
        noise = [host.isotropic(record, k, {}) for k in range(count)]
        for block in host.probed:
            spread = self.sigma * scales.get(block.name, 1.0)
            if not spread:
                continue
            mean = host.remembered("mean", block).view(-1)
            for lo in range(0, block.size, chunk_length(block)):
                piece = slice(lo, min(block.size, lo + chunk_length(block)))
                for advantage, z in zip(advantages, noise, strict=True):
                    mean[piece].sub_(z.u(block, piece) * (self.mean_rate * advantage / (count * spread)))


METHOD = Method(
    "zo-ldsd",
    "the best of K directions whose mean is learned online",
    "arXiv 2602.13659",
    parts=(LearnedMean,),
    probes=5,
)
