"""The records of a step: all that cannot be derived again, so that weights and records replay a run."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Number = float | tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What measuring a step found.

    Attributes:
        losses: ``(L(theta + eps u), L(theta - eps u))`` of each probe; ``(L(theta + eps u), L(theta))`` if one-sided.
        sides: 2, or 1 where probes are one-sided.
        extra: further numbers that are needed to apply the step.
    """

    losses: tuple[tuple[float, float], ...]
    sides: int = 2
    extra: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class StepStart:
    """What is known of a step before it is measured; see `StepRecord` for the attributes."""

    step: int
    seed: int
    lr: tuple[float, ...]
    eps: float
    scales: tuple[float, ...] | None = None

    def record(self, measured: Measured, forwards: float = -1) -> "StepRecord":
        """Return the record of this step, with what was measured."""
        return StepRecord(
            step=self.step,
            seed=self.seed,
            lr=self.lr,
            eps=self.eps,
            losses=measured.losses,
            scales=self.scales,
            extra=measured.extra,
            sides=measured.sides,
            forwards=forwards,
        )


@dataclass(frozen=True)
class StepRecord:
    """A step: what `RecordOptimizer.measure` found and `RecordOptimizer.apply` needs.

    Attributes:
        step: number of the step, from 0.
        seed: run seed of the noise.
        lr: learning rate of each parameter group.
        eps: probe radius.
        losses: ``(L(theta + eps u), L(theta - eps u))`` of each probe; ``(L(theta + eps u), L(theta))`` if one-sided.
        scales: normalised scale ``s`` of every block in order, where they were computed from the weights; else None.
        extra: further numbers that a method measures or derives from weights or data and needs to apply the step;
            ``gradient``, the norm of the gradient, where the step is first-order; ``exact_lr`` and ``exact_norm``, the
            learning rate and the norm of the exact gradient, where there is one.
        sides: 2, or 1 where probes are one-sided.
        forwards: forward passes that the record took; -1 (the default) stands for two a probe.
        exact: exact gradients by block name, little-endian float32; empty where they are too large for a record.
    """

    step: int
    seed: int
    lr: tuple[float, ...]
    eps: float
    losses: tuple[tuple[float, float], ...]
    scales: tuple[float, ...] | None = None
    extra: Mapping[str, Number] = field(default_factory=dict)
    sides: int = 2
    forwards: float = -1
    exact: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.forwards < 0:
            object.__setattr__(self, "forwards", 2 * len(self.losses))

    @property
    def skipped(self) -> bool:
        """Whether a loss is not finite: applying the record then changes no weight."""
        return not all(math.isfinite(number) for number in self._measured())

    @property
    def flat(self) -> bool:
        """Whether every slope is exactly zero, as a piecewise constant objective gives: the step moves nothing."""
        moved = self.extra.get("gradient") or self.extra.get("exact_norm")
        return not self.skipped and not any(self.slopes) and not moved

    @property
    def slopes(self) -> tuple[float, ...]:
        """Directional derivative along each probe in float64: ``(L+ - L-) / (2 eps)`` (arXiv 2305.17333, eq. 1)."""
        return tuple((pos - neg) / (self.sides * self.eps) for pos, neg in self.losses)

    @property
    def loss(self) -> float:
        """Mean of the measured losses, which estimates ``L(theta)`` up to second order in eps."""
        return sum(map(sum, self.losses)) / (2 * len(self.losses))

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return ``extra[name]`` as a tuple."""
        value = self.extra[name]
        return value if isinstance(value, tuple) else (value,)

    def _measured(self) -> Iterator[float]:
        for pair in self.losses:
            yield from pair
        for name in self.extra:
            yield from self.numbers(name)


@dataclass(frozen=True)
class ProjectionRecord:
    """A projection after a step: what `ZOOptimizer.project` found and `ZOOptimizer.apply` needs.

    Attributes:
        step: number of the step that it follows.
        ratios: for every projected block in order, what its displacement is multiplied by; empty where a loss was not
            finite, and nothing is projected.
        norms: length of the displacement of every projected block, before.
        losses: what was measured on the way.
        forwards: forward passes that it took; a backward pass counts two.
    """

    step: int
    ratios: tuple[float, ...]
    norms: tuple[float, ...]
    losses: tuple[float, ...]
    forwards: float


Step = StepStart | StepRecord  # what a direction is a function of, while it is measured and when it is applied
Record = StepRecord | ProjectionRecord
