"""Perturb weights when they are read: stored weights do not change while a probe is measured.

`PerturbedWeights` intercepts every torch function that reads a block and passes ``theta + eps * u`` instead, in a
temporary of one layer's size. Tied heads, layers called twice and weights read outside their owner's
``forward`` are perturbed alike, because tensors are recognised, not modules. There is nothing to restore, not even
after an exception.

Code that reads weights without torch functions (a scripted function, a cache of transposed weights) is not intercepted:
`verify_coverage` detects it by an in-place evaluation.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional

from zoft.memory import Buffers
from zoft.weights.blocks import Block
from zoft.weights.products import call_widened
from zoft.weights.replaced import ReplacedWeights

SLICE = {"cpu": 2**20}  # weights perturbed at a time in one layer: fits into the second-level cache of a core
SLICE_ELSEWHERE = 2**26


class WeightSource(Protocol):
    """Source of perturbed weights, such as `zoft.noise.direction.Direction` or the bit flips of `verify_coverage`."""

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write the flat range ``start:stop`` of the perturbed block into the flat ``out`` and return it."""
        ...

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the given rows of the perturbed block."""
        ...


class PerturbedWeights(ReplacedWeights):
    """Context in which every read of a block returns ``theta + eps * u``.

    Args:
        blocks: the blocks to perturb; other tensors are not affected.
        source: computes the perturbed weights, such as a `zoft.noise.direction.Direction`.
        eps: signed probe radius.

    ``used`` holds the names of the blocks that were read.
    """

    def __init__(self, blocks: Sequence[Block], source: WeightSource, eps: float) -> None:
        super().__init__(blocks)
        self._source, self._eps = source, eps
        self._buffers = Buffers()
        self.used: set[str] = set()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with perturbed blocks: a product in slices, an embedding with only the rows looked up."""
        if func is functional.linear and len(args) >= 2 and self.find(args[1]):
            return self._linear(*args, **kwargs)
        if (
            func is functional.embedding
            and len(args) >= 2
            and (block := self.find(args[1]))
            and self._plain(args, kwargs)
        ):
            self.used.add(block.name)
            return self._source.perturb_rows(block, args[0], self._eps)
        return super().call(func, args, kwargs)

    @staticmethod
    def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether an embedding call only looks up rows, without renormalising by ``max_norm``."""
        return kwargs.get("max_norm", args[3] if len(args) > 3 else None) is None

    def replacement(self, block: Block) -> torch.Tensor:
        """Return ``theta + eps * u`` for the whole block."""
        self.used.add(block.name)
        out = torch.empty(block.size, dtype=block.parameter.dtype, device=block.parameter.device)
        return self._source.perturb(block, 0, block.size, self._eps, out).view(block.shape)

    def _linear(self, x: torch.Tensor, weight: torch.nn.Parameter, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x W'^T + b'`` with ``W'`` computed in slices of rows, each multiplied while it is in cache."""
        block = self.find(weight)
        assert block is not None
        self.used.add(block.name)
        bias = self.replace(bias)
        outputs, width = block.shape
        step = max(1, SLICE.get(weight.device.type, SLICE_ELSEWHERE) // width)
        if step >= outputs:
            return call_widened(functional.linear, (x, self._rows(block, 0, outputs), bias), {})
        flat = x.reshape(-1, width)  # torch would copy the weights for every row of a non-contiguous batch
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)  # which does not affect products with ``out=``
        y = x.new_empty(len(flat), outputs, dtype=torch.get_autocast_dtype(device) if autocast else x.dtype)
        for start in range(0, outputs, step):
            stop = min(outputs, start + step)
            rows, to = self._rows(block, start, stop), y[:, start:stop]
            part = None if bias is None else bias[start:stop]
            if autocast:
                to.copy_(functional.linear(flat, rows, part))
            elif part is None:
                call_widened(torch.mm, (flat, rows.T), {"out": to})
            else:
                call_widened(torch.addmm, (part, flat, rows.T), {"out": to})
        return y.view(*x.shape[:-1], outputs)

    def _rows(self, block: Block, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start:stop`` of a perturbed matrix, in a buffer that the next call reuses."""
        width = block.shape[-1]
        out = self._buffers.take("rows", (stop - start) * width, block.parameter.dtype, block.parameter.device)
        return self._source.perturb(block, start * width, stop * width, self._eps, out).view(-1, width)
