"""ZO-SGD-Cons: of a step forth, a step back and none the best is taken (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from zoft.noise.direction import Direction
from zoft.noise.table import Where
from zoft.optim.core.derived import Derived
from zoft.optim.core.parts import Rule, Term
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer
    from zoft.optim.core.oracle import Look


class Conservative(Rule):
    """Evaluate ``L(theta - lr g)``, ``L(theta)``, ``L(theta + lr g)`` and go where it is lowest. No state.

    Three forward passes beside those of the probes. The trial points are evaluated on use, in the weights' dtype and
    without weight decay, which every step has.

    >>> Conservative().momentum
    False
    """

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """Return ``record`` with ``trials``: the losses after a step forth, at ``theta``, and after a step back."""
        record = super().measure(optimizer, look, record)
        directions = [optimizer.directions.direction(optimizer, record, p) for p in range(len(record.losses))]
        step = self._step(optimizer, record, directions)
        trials = (look(step, 1.0), look(), look(step, -1.0))
        return replace(record, extra={**record.extra, "trials": trials})

    def forwards(self, probes: int, steps: int, measured: int, whole: float) -> float:
        """Return three more a step."""
        return steps * (measured + 3)

    def _step(self, optimizer: ZOOptimizer, record: StepRecord, directions: Sequence[Direction]) -> Derived:
        """The update of ``record`` as a direction: ``theta + 1.0 * u`` is where it leads."""
        rates = {
            id(parameter): lr
            for group, lr in zip(optimizer.param_groups, record.lr, strict=True)
            for parameter in group["params"]
        }

        def u(block: Block, where: Where) -> torch.Tensor:
            terms = Rule.terms(self, optimizer, block, record, directions)
            parts = [direction.u(block, where) * coefficient for coefficient, direction in terms]
            return sum(parts[1:], start=parts[0]) * -rates[id(block.parameter)]

        return Derived(u, lambda block: all(direction.idle(block) for direction in directions))

    def terms(
        self, optimizer: ZOOptimizer, block: Block, record: StepRecord, directions: Sequence[Direction]
    ) -> list[Term]:
        """Return MeZO's terms, none, or MeZO's with the other sign; of equal trials the first is taken."""
        trials = record.numbers("trials")
        sign = (1, 0, -1)[trials.index(min(trials))]
        return [(sign * c, direction) for c, direction in super().terms(optimizer, block, record, directions)]
