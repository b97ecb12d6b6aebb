"""`RecordOptimizer`: a `torch.optim.Optimizer` whose step is a record."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from zoft.errors import ConfigError
from zoft.optim.core.groups import Parameters, blocks_of, check_blocks, named_groups
from zoft.optim.core.oracle import Closure
from zoft.optim.core.record import ProjectionRecord, Record, StepRecord
from zoft.weights.blocks import Block

_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda value: value >= 0, "0 or more"),
    "eps": (lambda value: value > 0, "more than 0"),
    "probes": (lambda value: value >= 1, "1 or more"),
    "weight_decay": (lambda value: value >= 0, "0 or more"),
    "seed": (lambda value: 0 <= value < 2**63, "0 or more, and less than 2**63"),
}


class RecordOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that splits its step: `measure` needs data, `apply` needs the weights alone.

    ``step(closure)`` is ``record = measure(closure)``, hand the record to ``journal``, ``apply(record)``; then the same
    for the projection that may follow. Zeroth-order methods (`ZOOptimizer`) and the first-order bounds (`FirstOrder`)
    are driven alike by it.

    Args:
        params: a model (its trainable blocks), named parameters, or parameter groups of these.
        defaults: settings of every group, checked here: lr, eps, probes, weight_decay, seed.
        journal: called with every record before it is applied.
    """

    needs_gradient = False  # whether a record alone moves nothing, so that a step has to be measured again

    def __init__(
        self, params: Parameters, defaults: dict[str, Any], journal: Callable[[Record], None] | None = None
    ) -> None:
        for name, value in defaults.items():
            good, expected = _BOUNDS[name]
            if not good(value):
                raise ConfigError(f"{name} is {value}: expected {expected}")
        super().__init__(named_groups(params), {**defaults, "step": 0})
        self.journal = journal
        self.blocks: list[Block] = [block for group in self.param_groups for block in blocks_of(group)]
        check_blocks(self.blocks)
        self._verified = False

    @property
    def step_number(self) -> int:
        """Number of the coming step."""
        number: int = self.param_groups[0]["step"]
        return number

    @step_number.setter
    def step_number(self, number: int) -> None:
        for group in self.param_groups:
            group["step"] = number

    @property
    def seed(self) -> int:
        """Run seed."""
        seed: int = self.param_groups[0]["seed"]
        return seed

    @property
    def eps(self) -> float:
        """Probe radius, in units of the weights; Adam's epsilon in a first-order method."""
        eps: float = self.param_groups[0]["eps"]
        return eps

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Learning rate of every parameter group in the coming step."""
        return tuple(float(group["lr"]) for group in self.param_groups)

    def state_of(self, block: Block) -> dict[str, Any]:
        """Return the state tensors of ``block`` by name."""
        state: dict[str, Any] = self.state[block.parameter]
        return state

    def forget(self) -> None:
        """Drop all state, as at step 0: a snapshot or records are about to bring that of another step."""
        self.state.clear()
        self.step_number = 0

    @abstractmethod
    def measure(self, closure: Closure) -> StepRecord:
        """Return the record of the coming step on the data of ``closure``; the weights are only read."""

    @abstractmethod
    def apply(self, record: Record) -> None:
        """Update the weights by ``record``."""

    def observe(self, record: Record) -> None:
        """Store what later steps read of ``record``; called for every record before those that are applied."""

    def verify(self, closure: Closure) -> str | None:
        """Check that the method can work with this model; return a warning or None."""
        self._verified = True
        return None

    def project(self, closure: Closure) -> ProjectionRecord | None:
        """Return the record of the projection that follows the step applied last; None where none is due."""
        return None

    def step(self, closure: Closure, *, projection: Closure | None = None) -> float:  # type: ignore[override]
        """Take one step, and the projection that may follow it; return the mean of the measured losses.

        ``projection`` is the closure that the projection is measured with, by default that of the step.
        """
        record = self.measure(closure)
        self._take(record)
        self.take_projection(projection or closure)
        return record.loss

    def take_projection(self, closure: Closure) -> None:
        """Measure and apply the projection that follows the step applied last, if one is due."""
        if (projected := self.project(closure)) is not None:
            self._take(projected)

    def _take(self, record: Record) -> None:
        if self.journal is not None:
            self.journal(record)
        self.apply(record)

    def _check_step(self, record: StepRecord) -> None:
        if record.step != self.step_number:
            raise ConfigError(f"the record is of step {record.step}, the optimizer is at step {self.step_number}")
