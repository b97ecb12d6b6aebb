"""Looking at the objective from somewhere near the weights, and counting what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.weights.blocks import Block
from zoft.weights.perturbed import PerturbedWeights, WeightSource

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer

Closure = Callable[[], Any]


class Source(WeightSource, Protocol):
    """What stands in for the stored weights while the objective is evaluated; a `Direction` is one."""

    def idle(self, block: Block) -> bool:
        """Whether ``block`` is read as it is stored."""
        ...


@dataclass(frozen=True)
class Whole:
    """The objective on all training examples, for the methods that need it now and then.

    ``forwards`` is what one evaluation costs: n / B forward passes on a batch of B.
    """

    closure: Closure
    forwards: float


class Look:
    """Evaluates the closure of one step where it is asked to, and counts the forward passes."""

    def __init__(self, optimizer: ZOOptimizer, closure: Closure) -> None:
        self._optimizer, self.closure, self._cost = optimizer, closure, 1.0
        self._meter = [0.0]

    @property
    def forwards(self) -> float:
        """Forward passes so far; a whole number is an int."""
        count = self._meter[0]
        return int(count) if count == int(count) else count

    def count(self, forwards: float) -> None:
        """Add to the forward passes what was evaluated elsewhere."""
        self._meter[0] += forwards

    def __call__(self, source: Source | None = None, eps: float = 0.0) -> float:
        """Return the objective at ``theta + eps u`` for the direction ``source``; without one, at ``theta``.

        The stored weights are only read. Blocks on which ``u`` is zero are read as they stand.
        """
        return read([self.unread(source, eps)])[0]

    def unread(self, source: Source | None = None, eps: float = 0.0) -> Any:
        """As a call, but return what the closure does, for `read`: a GPU is not waited for."""
        self.count(self._cost)
        if source is None:
            return _own(self.closure())
        blocks = [block for block in self._optimizer.blocks if not source.idle(block)]
        with PerturbedWeights(blocks, source, eps):
            return _own(self.closure())

    def both(self, source: Source, eps: float) -> Sequence[Any]:
        """Return the objective at both ends, ``theta + eps u`` and ``theta - eps u``, not read.

        A closure that can evaluate both itself is asked to (`zoft.deploy.graphs`); it returns None where it cannot.
        """
        both = getattr(self.closure, "both", None) if type(source) is Direction else None
        ends = None if both is None else both(source, eps)
        if ends is None:
            return [self.unread(source, eps), self.unread(source, -eps)]
        self.count(2 * self._cost)
        return list(ends)

    def whole(self) -> Look:
        """Return a look at the objective on all training examples, which counts what that costs."""
        whole = self._optimizer.whole
        if whole is None:
            raise ConfigError(
                "this method evaluates all training examples now and then: give the optimizer "
                "whole=Whole(closure, forwards), a closure over all of them and what one evaluation costs"
            )
        look = Look(self._optimizer, whole.closure)
        look._cost, look._meter = whole.forwards, self._meter
        return look


def read(values: Sequence[Any]) -> list[float]:
    """Return numbers and one-element tensors as floats; tensors of one kind are waited for once, not one by one.

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
