"""MeZO-SVRG: variance reduced by a full-batch estimate at a reference point (arXiv 2404.08080, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.optim.core.derived import Elsewhere
from zoft.optim.core.parts import Rule, Term
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer
    from zoft.optim.core.oracle import Look


class SVRG(Rule):
    """Every ``refresh`` steps ``theta' <- theta``, ``theta <- theta - lr_1 g'`` with g' estimated on all training data.

    In the other steps ``theta <- theta - lr [g(theta) - g(theta') + g']``, both g on the step's batch and along the
    same directions, so that their noise cancels as theta nears theta'. ``lr_1 = full_ratio lr``. Forward passes:
    2 n / B a probe in a full step, 4 in the others. State: theta', the weights once more; g' is drawn again.

    Once in an epoch, where the mean loss of the last is above ``rise`` times that of the one before, both rates are
    divided by ``anneal``, down to floors. With ``refresh = 1``, ``full_ratio = 1`` it is MeZO on all examples.

    >>> SVRG(refresh=5).full_ratio
    1000.0
    """

    refresh: int = Field(2, ge=1, description="steps from one full-batch estimate to the next, q")
    full_ratio: float = Field(1000.0, gt=0, description="learning rate of full-batch steps, as a multiple of lr")
    anneal: float = Field(5.0, ge=1, description="what the rates are divided by where the loss has risen; 1: never")
    rise: float = Field(1.05, gt=0, description="a mean loss above so many times the last epoch's has risen")
    floor: float = Field(1e-6, ge=0, description="least rate that annealing leaves")
    full_floor: float = Field(1e-5, ge=0, description="least rate that annealing leaves to full-batch steps")

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """Return ``record`` with the losses at ``theta`` on all examples, or on the batch with those at theta'."""
        if optimizer.directions.stateful:
            raise ConfigError("mezo-svrg draws the directions of an earlier step again, which these cannot")
        whole = look.whole()
        epoch = max(1, round(optimizer.whole.forwards)) if optimizer.whole else 1
        extra = {**record.extra, "divisor": optimizer.memory.get("divisor", 1.0), "epoch": float(epoch)}
        record = replace(record, extra=extra)
        if record.step % self.refresh == 0 or "reference" not in optimizer.memory:
            return optimizer.directions.measure(optimizer, whole, record)
        record = optimizer.directions.measure(optimizer, look, record)
        weights = {block.name: optimizer.state[block.parameter]["reference"] for block in optimizer.blocks}
        losses: list[float] = []
        for probe in range(len(record.losses)):
            there = Elsewhere(optimizer.directions.direction(optimizer, record, probe), weights)
            losses += [look(there, record.eps), look(there, -record.eps if record.sides == 2 else 0.0)]
        return replace(record, extra={**record.extra, "reference": tuple(losses)})

    def forwards(self, probes: int, steps: int, measured: int, whole: float) -> float:
        """Return those of the full steps on all examples, and two a probe more in the others."""
        full = -(-steps // self.refresh)
        return full * measured * whole + (steps - full) * (measured + 2 * probes)

    def before(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        """Keep the weights that a full-batch estimate is of."""
        if "reference" not in record.extra:
            for block in optimizer.blocks:
                optimizer.state[block.parameter]["reference"] = block.parameter.detach().clone()

    def coefficients(self, optimizer: ZOOptimizer, record: StepRecord) -> tuple[float, ...]:
        """Return the slopes over q, those at theta' taken off, in units of the annealed rate."""
        count, full = len(record.losses), "reference" not in record.extra
        slopes: Sequence[float] = record.slopes
        if not full:
            there = record.numbers("reference")
            pairs = zip(there[::2], there[1::2], strict=True)
            slopes = [
                here - (pos - neg) / (record.sides * record.eps) for here, (pos, neg) in zip(slopes, pairs, strict=True)
            ]
        rate = self._rate(record, full)
        return tuple(slope * rate / count for slope in slopes)

    def terms(
        self, optimizer: ZOOptimizer, block: Block, record: StepRecord, directions: Sequence[Direction]
    ) -> list[Term]:
        """Return the terms of the batch, and those of the full-batch estimate where it is of an earlier step."""
        terms = super().terms(optimizer, block, record, directions)
        if "reference" not in record.extra:
            return terms
        last: StepRecord = optimizer.memory["reference"]
        rate, weight = self._rate(record, full=False) / len(last.losses), optimizer.directions.weight(block)
        return terms + [
            (slope * rate * weight, optimizer.directions.direction(optimizer, last, probe))
            for probe, slope in enumerate(last.slopes)
        ]

    def _rate(self, record: StepRecord, full: bool) -> float:
        """What multiplies the learning rate."""
        ratio, floor = (self.full_ratio, self.full_floor) if full else (1.0, self.floor)
        (divisor,), given = record.numbers("divisor"), record.lr[0] * ratio
        return max(ratio / divisor, min(given, floor) / record.lr[0]) if divisor != 1 and record.lr[0] else ratio

    def observe(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        """Remember the last full-batch estimate, and anneal the rates once in an epoch."""
        memory, epoch = optimizer.memory, int(record.numbers("epoch")[0])
        if "reference" not in record.extra:
            memory["reference"] = record
        losses = [*memory.get("losses", []), record.loss][-2 * epoch :]
        if (record.step + 1) % epoch == 0 and len(losses) == 2 * epoch:
            before, now = sum(losses[:epoch]), sum(losses[epoch:])
            if now > self.rise * before:
                memory["divisor"] = memory.get("divisor", 1.0) * self.anneal
        memory["losses"] = losses
