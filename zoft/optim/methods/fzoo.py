"""FZOO: one-sided random signs, and steps in units of the spread of their losses (arXiv 2506.09034)."""

from __future__ import annotations

from dataclasses import replace
from statistics import pstdev
from typing import TYPE_CHECKING

import torch

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.noise.table import Where
from zoft.optim.core.derived import Derived
from zoft.optim.core.parts import Directions, Rule
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer
    from zoft.optim.core.oracle import Look


class Signs(Directions):
    """``u = s r`` with r random signs, measured on one side: ``L(theta + eps u) - L(theta)``; q + 1 forward passes.

    The signs are those of the noise that MeZO would take. No state.

    >>> Signs().stateful
    False
    """

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """Return ``record`` with the losses at one end of every probe and at ``theta``."""
        centre = look()
        probes = range(optimizer.param_groups[0]["probes"])
        losses = tuple((look(self.direction(optimizer, record, probe), record.eps), centre) for probe in probes)
        return replace(record, losses=losses, sides=1)

    def forwards(self, probes: int) -> int:
        """Return one for every probe, and one at ``theta``."""
        return probes + 1

    def direction(self, optimizer: ZOOptimizer, record: StepRecord, probe: int) -> Direction:
        """Return the signs of one probe."""
        z, scales = optimizer.isotropic(record, probe, {}), optimizer.named_scales(record)

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

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """As the directions measure."""
        if optimizer.param_groups[0]["probes"] < 2:
            raise ConfigError("fzoo divides by the spread of its probes' losses and needs 2 probes at least; try 8")
        return super().measure(optimizer, look, record)

    def coefficients(self, optimizer: ZOOptimizer | None, record: StepRecord) -> tuple[float, ...]:
        """Return the differences of the losses over q and over the standard deviation."""
        spread = pstdev(pos for pos, _ in record.losses)
        scale = 1 / (len(record.losses) * spread) if spread else 0.0
        return tuple((pos - neg) * scale for pos, neg in record.losses)
