"""ZO-AdaMU: momentum in the perturbation, adapted by its uncertainty (arXiv 2312.15184)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.noise.table import Where, at, chunk_length
from zoft.optim.core.derived import Derived
from zoft.optim.core.method import Method, Published
from zoft.optim.core.parts import Directions, Host, Rule
from zoft.optim.core.pieces import Term
from zoft.optim.core.record import Step, StepRecord
from zoft.weights.blocks import Block

_EXPONENTS = (1.0, 0.1, 1.5)  # phi of a, b1 and b2 in the published code


class Shares(NamedTuple):
    """The annealed numbers of a step: variance ``a`` and weights ``b1``, ``b2`` of what is fresh."""

    a: float
    b1: float
    b2: float


class Mixed(NamedTuple):
    """What is probed, and its uncertainty."""

    m: torch.Tensor
    v: torch.Tensor


class MomentumNoise(Directions):
    """``u = m = b1 z' + (1 - b1) z''`` with fresh ``z' ~ N(0, a)`` and ``z'' ~ N(h, 1 - a)`` around the history h.

    After the step ``h <- sign(slope) m``, the mean over probes. a, b1 and b2 are 1, and it is MeZO, for the first
    ``warmup`` steps; then they go down on a cosine up to ``anneal_until`` of the run. State: h, one number a weight.

    >>> [round(share, 3) for share in MomentumNoise(warmup=0, total_steps=100).shares(50)]
    [0.389, 0.49, 0.323]
    """

    stateful: ClassVar[bool] = True

    warmup: int = Field(1024, ge=0, description="steps of MeZO at the start, T1")
    anneal_until: float = Field(0.8, gt=0, le=1, description="share of the run after which the weights stay, T2")
    total_steps: int | None = Field(None, ge=1, description="length of the run; null: that of the run")

    def shares(self, step: int) -> Shares:
        """Return a, b1, b2 at ``step``: ``(1 + cos(pi (t - T1) / T_t)) / 2`` with T_t shrinking from T."""
        if self.total_steps is None:
            raise ConfigError("zo-adamu anneals over the run: give its length as total_steps")
        if step < self.warmup:
            return Shares(1.0, 1.0, 1.0)
        total, end = self.total_steps, max(self.warmup + 1, round(self.anneal_until * self.total_steps))
        gone = min(step, end) - self.warmup
        lengths = (total - phi * (total - end) * gone / (end - self.warmup) for phi in _EXPONENTS)
        return Shares(*(0.5 * (1 + math.cos(math.pi * min(1.0, gone / max(1.0, length)))) for length in lengths))

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return m of one probe."""
        z = host.isotropic(step, probe)
        if step.step < self.warmup:
            return z
        mixed = self.mixed(host, step, probe)
        return Derived(lambda block, where: mixed(block, where).m, z.idle)

    def mixed(self, host: Host, step: Step, probe: int) -> Callable[[Block, Where], Mixed]:
        """Return what gives m and ``v = b2 z'^2 + (1 - b2) z''^2`` at a place."""
        shares = self.shares(step.step)
        first = host.isotropic(step, probe)
        second = host.isotropic(step, probe + host.probes)  # independent of the first

        def at_place(block: Block, where: Where) -> Mixed:
            fresh = first.u(block, where) * math.sqrt(shares.a)
            around = second.u(block, where) * math.sqrt(1 - shares.a)
            around = around + at(host.remembered("history", block), block, where)
            m = fresh * shares.b1 + around * (1 - shares.b1)
            return Mixed(m, fresh.square() * shares.b2 + around.square() * (1 - shares.b2))

        return at_place

    def learn(self, host: Host, record: StepRecord) -> None:
        """Move the history."""
        directions = [self.direction(host, record, probe) for probe in range(len(record.losses))]
        signs = [(slope > 0) - (slope < 0) for slope in record.slopes]
        for block in host.probed:
            history = host.remembered("history", block).view(-1)
            for lo in range(0, block.size, chunk_length(block)):
                piece = slice(lo, min(block.size, lo + chunk_length(block)))
                parts = [u.u(block, piece) * (sign / len(signs)) for u, sign in zip(directions, signs, strict=True)]
                history[piece] = sum(parts[1:], start=parts[0])


class UncertainSteps(Rule):
    """``theta <- theta - lr / q sum_p slope_p m_p / sqrt(v_p + epsilon)``; MeZO's while the warm-up lasts.

    >>> UncertainSteps().epsilon
    1e-08
    """

    epsilon: float = Field(1e-8, gt=0, description="added to v under the root")

    def check(self, host: Host) -> None:
        """Raise `ConfigError` where the directions have no uncertainty."""
        if not isinstance(host.directions, MomentumNoise):
            raise ConfigError("the rule of zo-adamu divides by what its directions know: give MomentumNoise, too")

    def terms(self, host: Host, block: Block, record: StepRecord, directions: Sequence[Direction]) -> list[Term]:
        """Return the coefficients and what was probed over its uncertainty."""
        noise = host.directions
        assert isinstance(noise, MomentumNoise)  # `check`
        terms = super().terms(host, block, record, directions)
        if record.step < noise.warmup:
            return terms
        return [
            (coefficient, self._over_uncertainty(host, noise, record, probe, direction))
            for probe, (coefficient, direction) in enumerate(terms)
        ]

    def _over_uncertainty(
        self, host: Host, noise: MomentumNoise, record: StepRecord, probe: int, direction: Direction
    ) -> Derived:
        mixed = noise.mixed(host, record, probe)

        def u(block: Block, where: Where) -> torch.Tensor:
            m, v = mixed(block, where)
            return m / (v + self.epsilon).sqrt()

        return Derived(u, direction.idle)


METHOD = Method(
    "zo-adamu",
    "momentum in the perturbation",
    "arXiv 2312.15184",
    parts=(MomentumNoise, UncertainSteps),
    published={"full": Published(), "lora": Published(1e-4, 1e-2)},  # those for LoRA are of its own script
)
