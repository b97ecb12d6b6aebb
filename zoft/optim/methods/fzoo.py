"""FZOO: one-sided random signs, and steps in units of the spread of their losses (arXiv 2506.09034)."""

from __future__ import annotations

from statistics import pstdev
from typing import ClassVar

import torch

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.noise.table import Where
from zoft.optim.core.derived import Derived
from zoft.optim.core.method import Method, Published
from zoft.optim.core.oracle import Oracle
from zoft.optim.core.parts import Directions, Host, Rule
from zoft.optim.core.record import Measured, Step, StepRecord, StepStart
from zoft.weights.blocks import Block


class Signs(Directions):
    """``u = s r`` with r random signs, measured on one side: ``L(theta + eps u) - L(theta)``; q + 1 forward passes.

    The signs are those of the noise that MeZO would take. No state.

    >>> Signs().stateful
    False
    """

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return the losses at one end of every probe and at ``theta``."""
        centre = oracle()
        ends = (oracle(self.direction(host, start, probe), start.eps) for probe in range(host.probes))
        return Measured(tuple((end, centre) for end in ends), sides=1)

    def forwards(self, probes: int) -> int:
        """Return one for every probe, and one at ``theta``."""
        return probes + 1

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the signs of one probe."""
        z, scales = host.isotropic(step, probe, {}), host.named_scales(step)

        def signs(block: Block, where: Where) -> torch.Tensor:
            scale = scales.get(block.name, 1.0)
            noise = z.u(block, where)
            return torch.full_like(noise, scale).copysign_(noise)  # a tenth of the time of torch.where

        return Derived(signs, lambda block: scales.get(block.name) == 0)


class SpreadSteps(Rule):
    """``theta <- theta - lr / (q s) sum_p (L_p - L_0) u_p`` with s the standard deviation of the q losses ``L_p``.

    The estimate is normalised by its own size, so eps cancels and the learning rate is in units of the weights. Where
    all losses are equal nothing moves.

    >>> SpreadSteps().coefficients(None, StepRecord(0, 0, (1.0,), 1.0, ((3.0, 2.0), (1.0, 2.0)), sides=1))
    (0.5, -0.5)
    """

    scale_free: ClassVar[bool] = True

    def check(self, host: Host) -> None:
        """Raise `ConfigError` where there is one probe, whose loss has no spread."""
        if host.probes < 2:
            raise ConfigError("fzoo divides by the spread of its probes' losses and needs 2 probes at least; try 8")

    def coefficients(self, host: Host | None, record: StepRecord) -> tuple[float, ...]:
        """Return the differences of the losses over q and over the standard deviation."""
        spread = pstdev(pos for pos, _ in record.losses)
        scale = 1 / (len(record.losses) * spread) if spread else 0.0
        return tuple((pos - neg) * scale for pos, neg in record.losses)


METHOD = Method(
    "fzoo",
    "one-sided signs, steps in units of the losses' spread",
    "arXiv 2506.09034",
    parts=(Signs, SpreadSteps),
    published={"full": Published(5e-5, 1e-4)},
    probes=8,
)
