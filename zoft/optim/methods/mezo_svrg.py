"""MeZO-SVRG: variance reduced by a full-batch estimate at a reference point (arXiv 2404.08080, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.optim.core.derived import Elsewhere
from zoft.optim.core.method import Method
from zoft.optim.core.oracle import Oracle
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.pieces import Term
from zoft.optim.core.record import Measured, StepRecord, StepStart
from zoft.weights.blocks import Block


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

    def check(self, host: Host) -> None:
        """Raise `ConfigError` where the directions of an earlier step cannot be drawn again."""
        if host.directions.stateful:
            raise ConfigError("mezo-svrg draws the directions of an earlier step again, which these cannot")

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return the losses at ``theta`` on all examples, or on the batch with those at theta'."""
        full = oracle.full()
        epoch = max(1, round(host.full.forwards)) if host.full else 1
        annealing = {"divisor": host.memory.get("divisor", 1.0), "epoch": float(epoch)}
        if start.step % self.refresh == 0 or "reference" not in host.memory:
            measured = host.directions.measure(host, full, start)
            return replace(measured, extra={**annealing, **measured.extra})
        measured = host.directions.measure(host, oracle, start)
        there = self._at_reference(host, oracle, start.record(measured))
        return replace(measured, extra={**annealing, **measured.extra, "reference": there})

    def _at_reference(self, host: Host, oracle: Oracle, record: StepRecord) -> tuple[float, ...]:
        """The losses of the probes of ``record`` at theta', one after the other."""
        weights = {block.name: host.state_of(block)["reference"] for block in host.blocks}
        losses: list[float] = []
        for probe in range(len(record.losses)):
            there = Elsewhere(host.directions.direction(host, record, probe), weights)
            losses += [oracle.elsewhere(there, eps) for eps in (record.eps, -record.eps if record.sides == 2 else 0.0)]
        return tuple(losses)

    def forwards(self, probes: int, steps: int, measured: int, whole: float) -> float:
        """Return those of the full steps on all examples, and two a probe more in the others."""
        full = -(-steps // self.refresh)
        return full * measured * whole + (steps - full) * (measured + 2 * probes)

    def before(self, host: Host, record: StepRecord) -> None:
        """Keep the weights that a full-batch estimate is of."""
        if "reference" not in record.extra:
            for block in host.blocks:
                host.state_of(block)["reference"] = block.parameter.detach().clone()

    def coefficients(self, host: Host, record: StepRecord) -> tuple[float, ...]:
        """Return the slopes over q, those at theta' taken off, in units of the annealed rate."""
        count, full = len(record.losses), "reference" not in record.extra
        slopes: Sequence[float] = record.slopes
        if not full:
            there = record.numbers("reference")
            pairs = zip(there[::2], there[1::2], strict=True)
            slopes = [
                here - (pos - neg) / (record.sides * record.eps) for here, (pos, neg) in zip(slopes, pairs, strict=True)
            ]
        rate = self.rate(record, full)
        return tuple(slope * rate / count for slope in slopes)

    def terms(self, host: Host, block: Block, record: StepRecord, directions: Sequence[Direction]) -> list[Term]:
        """Return the terms of the batch, and those of the full-batch estimate where it is of an earlier step."""
        terms = super().terms(host, block, record, directions)
        if "reference" not in record.extra:
            return terms
        last: StepRecord = host.memory["reference"]
        rate, weight = self.rate(record, full=False) / len(last.losses), host.directions.weight(block)
        return terms + [
            (slope * rate * weight, host.directions.direction(host, last, probe))
            for probe, slope in enumerate(last.slopes)
        ]

    def rate(self, record: StepRecord, full: bool) -> float:
        """Return the factor on the learning rate of ``record``, annealed, for a full-batch step or another."""
        ratio, floor = (self.full_ratio, self.full_floor) if full else (1.0, self.floor)
        (divisor,), given = record.numbers("divisor"), record.lr[0] * ratio
        return max(ratio / divisor, min(given, floor) / record.lr[0]) if divisor != 1 and record.lr[0] else ratio

    def observe(self, host: Host, record: StepRecord) -> None:
        """Remember the last full-batch estimate, and anneal the rates once in an epoch."""
        memory, epoch = host.memory, int(record.numbers("epoch")[0])
        if "reference" not in record.extra:
            memory["reference"] = record
        losses = [*memory.get("losses", []), record.loss][-2 * epoch :]
        if (record.step + 1) % epoch == 0 and len(losses) == 2 * epoch:
            before, now = sum(losses[:epoch]), sum(losses[epoch:])
            if now > self.rise * before:
                memory["divisor"] = memory.get("divisor", 1.0) * self.anneal
        memory["losses"] = losses


METHOD = Method(
    "mezo-svrg",
    "variance reduced by full-batch estimates",
    "arXiv 2404.08080",
    parts=(SVRG,),
)
