"""ZO-SGD-Cons: of a step forth, a step back and none the best is taken (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from zoft.noise.direction import Direction
from zoft.noise.table import Where
from zoft.optim.core.derived import Derived
from zoft.optim.core.method import ZO_BENCH_GRID, Method, Published
from zoft.optim.core.oracle import Oracle
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.pieces import Term
from zoft.optim.core.record import Measured, StepRecord, StepStart
from zoft.weights.blocks import Block


class Conservative(Rule):
    """Evaluate ``L(theta - lr g)``, ``L(theta)``, ``L(theta + lr g)`` and go where it is lowest. No state.

    Three forward passes beside those of the probes. The trial points are evaluated on use, in the weights' dtype and
    without weight decay, which every step has.

    >>> Conservative().momentum
    False
    """

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return the losses, and ``trials``: those after a step forth, at ``theta``, and after a step back."""
        measured = super().measure(host, oracle, start)
        record = start.record(measured)
        directions = [host.directions.direction(host, record, p) for p in range(len(record.losses))]
        step = self._step(host, record, directions)
        trials = (oracle.elsewhere(step, 1.0), oracle(), oracle.elsewhere(step, -1.0))
        return replace(measured, extra={**measured.extra, "trials": trials})

    def forwards(self, probes: int, steps: int, measured: int, whole: float) -> float:
        """Return three more a step."""
        return steps * (measured + 3)

    def _step(self, host: Host, record: StepRecord, directions: Sequence[Direction]) -> Derived:
        """The update of ``record`` as a direction: ``theta + 1.0 * u`` is where it leads."""
        rates = host.named_rates(record)

        def u(block: Block, where: Where) -> torch.Tensor:
            terms = Rule.terms(self, host, block, record, directions)
            parts = [direction.u(block, where) * coefficient for coefficient, direction in terms]
            return sum(parts[1:], start=parts[0]) * -rates[block.name]

        return Derived(u, lambda block: all(direction.idle(block) for direction in directions))

    def terms(self, host: Host, block: Block, record: StepRecord, directions: Sequence[Direction]) -> list[Term]:
        """Return MeZO's terms, none, or MeZO's with the other sign; of equal trials the first is taken."""
        trials = record.numbers("trials")
        sign = (1, 0, -1)[trials.index(min(trials))]
        return [(sign * c, direction) for c, direction in super().terms(host, block, record, directions)]


METHOD = Method(
    "zo-conservative",
    "a step forth, back or none: the best of three",
    "arXiv 2402.11592",
    parts=(Conservative,),
    published={"full": Published(grid=ZO_BENCH_GRID)},
)
