"""The record of a step: everything about it that cannot be derived again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """What `ZOOptimizer.measure` found and `ZOOptimizer.apply` needs; a step is its record.

    Attributes:
        step: number of the step, from 0.
        seed: run seed of the noise.
        lr: learning rate of each parameter group.
        eps: probe radius.
        losses: ``(L(theta + eps u), L(theta - eps u))`` of each probe.
        scales: normalised scale ``s`` of every block in order, where they were computed from the weights; else None.
        extra: further numbers that a method derives from weights or data and needs to apply the step; ``gradient``,
            the norm of the gradient, where the step is first-order.
    """

    step: int
    seed: int
    lr: tuple[float, ...]
    eps: float
    losses: tuple[tuple[float, float], ...]
    scales: tuple[float, ...] | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether a loss is not finite: applying the record then changes no weight."""
        return not all(math.isfinite(loss) for pair in self.losses for loss in pair)

    @property
    def flat(self) -> bool:
        """Whether every slope is exactly zero, as a piecewise constant objective gives: the step moves nothing."""
        return not self.skipped and not any(self.slopes) and not self.extra.get("gradient")

    @property
    def slopes(self) -> tuple[float, ...]:
        """Directional derivative along each probe in float64: ``(L+ - L-) / (2 eps)`` (arXiv 2305.17333, eq. 1)."""
        return tuple((pos - neg) / (2 * self.eps) for pos, neg in self.losses)

    @property
    def loss(self) -> float:
        """Mean of the measured losses, which estimates ``L(theta)`` up to second order in eps."""
        return sum(map(sum, self.losses)) / (2 * len(self.losses))
