"""Replace blocks by other tensors when they are read."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from zoft.weights.blocks import Block
from zoft.weights.products import call_widened
from zoft.weights.reading import BlockLayer


class ReplacedWeights(BlockLayer):
    """Context in which functions read `replacement` instead of each block; other tensors are not affected."""

    def replacement(self, block: Block) -> torch.Tensor:
        """Return the replacement of ``block``, of its shape."""
        raise NotImplementedError

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with every block among its arguments replaced."""
        return call_widened(func, self._replaced(args), {key: self.replace(value) for key, value in kwargs.items()})

    def replace(self, value: Any) -> Any:
        """Return ``value``, or its replacement if it is a block; of a tuple or list, the same for each item."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._replaced(value)) if any(self.find(item) for item in value) else value
        block = self.find(value)
        return value if block is None else self.replacement(block)

    def _replaced(self, values: Sequence[Any]) -> list[Any]:
        return [self.replace(value) for value in values]
