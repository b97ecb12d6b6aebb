"""Oracle: evaluate the objective at perturbed weights and count forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from zoft.errors import ConfigError
from zoft.noise.direction import Direction, NoiseDirection
from zoft.optim.core.head import HeadMeter
from zoft.weights.blocks import Block
from zoft.weights.perturbed import PerturbedWeights, WeightSource

Closure = Callable[[], Any]


class Source(WeightSource, Protocol):
    """Replacements for the stored weights while the objective is evaluated; a `Direction` is one."""

    def idle(self, block: Block) -> bool:
        """Whether ``block`` is read as it is stored."""
        ...


@dataclass(frozen=True)
class FullObjective:
    """The objective on all training examples, for methods that evaluate it from time to time.

    ``forwards`` is the cost of one evaluation: n / B forward passes for n examples and batches of B.
    """

    closure: Closure
    forwards: float


class Oracle:
    """Evaluates the closure of one step at perturbed weights, and counts the forward passes.

    Args:
        blocks: the blocks that may be perturbed.
        closure: the objective on the batch of the step.
        full: the objective on all training examples.
        meter: takes the gradient by the head in evaluations at theta and at the ends of probes.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        closure: Closure,
        full: FullObjective | None = None,
        meter: HeadMeter | None = None,
    ) -> None:
        self._blocks, self.closure, self._full, self._cost = blocks, closure, full, 1.0
        self._head_meter = meter
        self._meter = [0.0]

    @property
    def forwards(self) -> float:
        """Forward passes so far; a whole number is an int."""
        count = self._meter[0]
        return int(count) if count == int(count) else count

    def count(self, forwards: float) -> None:
        """Add forward passes that were made elsewhere."""
        self._meter[0] += forwards

    def __call__(self, source: Source | None = None, eps: float = 0.0) -> float:
        """Return the objective at ``theta + eps u`` for the direction ``source``; without one, at ``theta``.

        The stored weights are only read. Blocks on which ``u`` is zero are read as they are stored.
        """
        return read([self.unread(source, eps)])[0]

    def elsewhere(self, source: Source, eps: float) -> float:
        """Return the objective with other weights than theta and the ends of probes: no gradient is taken there."""
        self.count(self._cost)
        return read([self._evaluated(self._perturbed(source, eps))])[0]

    def unread(self, source: Source | None = None, eps: float = 0.0) -> Any:
        """Return what the closure returns at ``theta + eps u``, for `read`, without waiting for a GPU."""
        self.count(self._cost)
        perturbed = None if source is None else self._perturbed(source, eps)
        if self._head_meter is not None and not self._head_meter.settled:
            return self._head_meter(self.closure, perturbed)
        return self._evaluated(perturbed)

    def _perturbed(self, source: Source, eps: float) -> PerturbedWeights:
        return PerturbedWeights([block for block in self._blocks if not source.idle(block)], source, eps)

    def _evaluated(self, perturbed: PerturbedWeights | None) -> Any:
        with perturbed or nullcontext():
            return _own(self.closure())

    def both(self, source: Direction, eps: float) -> Sequence[Any]:
        """Return the objective at ``theta + eps u`` and ``theta - eps u``, not read.

        A closure may have a method ``both`` that evaluates both ends of noise from the table (captured graphs); it
        returns None where it cannot.
        """
        captured = isinstance(source, NoiseDirection) and self._head_meter is None
        both = getattr(self.closure, "both", None) if captured else None
        ends = None if both is None else both(source, eps)
        if ends is None:
            return [self.unread(source, eps), self.unread(source, -eps)]
        self.count(2 * self._cost)
        return list(ends)

    def full(self) -> Oracle:
        """Return the oracle of the objective on all training examples, which counts its cost.

        Raises:
            ConfigError: the optimizer was not given that objective.
        """
        if self._full is None:
            raise ConfigError(
                "this method evaluates all training examples from time to time: give the optimizer "
                "full=FullObjective(closure, forwards), a closure over all of them and the cost of one evaluation"
            )
        oracle = Oracle(self._blocks, self._full.closure, meter=self._head_meter)
        oracle._cost, oracle._meter = self._full.forwards, self._meter
        return oracle


def read(values: Sequence[Any]) -> list[float]:
    """Return numbers and one-element tensors as floats; tensors of one kind in one copy from the device.

    >>> read([torch.tensor(0.5), torch.tensor([2.0])])
    [0.5, 2.0]
    """
    kinds = {(value.dtype, value.device) if isinstance(value, torch.Tensor) else None for value in values}
    if len(kinds) != 1 or None in kinds:
        return [float(value) for value in values]
    return [float(number) for number in torch.stack([value.reshape(()) for value in values]).tolist()]


def _own(value: Any) -> Any:
    """A copy of a tensor, which the closure may overwrite when it is called again."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
