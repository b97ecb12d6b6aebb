"""Blocks with the anchors that their displacement is measured from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from zoft.errors import ConfigError
from zoft.noise.table import chunk_length
from zoft.weights.blocks import Block
from zoft.weights.dtypes import work_dtype
from zoft.weights.replaced import ReplacedWeights


class Anchored:
    """Blocks and the weights that they started from; ``at(ratios)`` is what stands in for them.

    With displacement ``D = theta - anchor`` and ratio r that is ``anchor + r D``, computed as ``theta + (r - 1) D``, so
    that at ratio 1 it is ``theta`` to the bit.
    """

    def __init__(self, blocks: Sequence[Block], anchors: Sequence[torch.Tensor], ratios: Any = None) -> None:
        self.pairs = list(zip(blocks, anchors, strict=True))
        self._anchors = {block.name: anchor for block, anchor in self.pairs}
        self._by = {} if ratios is None else {b.name: float(r) - 1 for b, r in zip(blocks, ratios, strict=True)}

    def at(self, ratios: Any) -> Anchored:
        """Return the same blocks with ``ratios``."""
        blocks, anchors = zip(*self.pairs, strict=True)
        return Anchored(blocks, anchors, ratios)

    def idle(self, block: Block) -> bool:
        """Whether ``block`` is read as it is stored: no anchor, or ratio 1."""
        return not self._by.get(block.name)

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write the flat range ``start:stop`` of what stands in for ``block`` into the flat ``out`` and return it."""
        theta, anchor = block.parameter.detach().view(-1), self._anchors[block.name].view(-1)
        for lo in range(start, stop, chunk_length(block)):
            hi = min(stop, lo + chunk_length(block))
            out[lo - start : hi - start] = _rescaled(theta[lo:hi], anchor[lo:hi], self._by[block.name])
        return out

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return rows of what stands in for ``block``."""
        theta = block.parameter.detach()[rows]
        return _rescaled(theta, self._anchors[block.name][rows], self._by[block.name]).to(theta.dtype)


def _rescaled(theta: torch.Tensor, anchor: torch.Tensor, by: float) -> torch.Tensor:
    dtype = work_dtype(theta.dtype)
    wide = theta.to(dtype)
    return wide + (wide - anchor.to(dtype)) * by


def length_of(block: Block, anchor: torch.Tensor) -> float:
    """Return ``|theta - anchor|``: squares summed in float64, a chunk at a time.

    >>> length_of(Block("w", torch.nn.Parameter(torch.tensor([3.0, 4.0]))), torch.zeros(2))
    5.0
    """
    theta, start, length = block.parameter.detach().view(-1), anchor.view(-1), chunk_length(block)
    pieces = zip(theta.split(length), start.split(length), strict=True)
    return float(sum(float((a.double() - b.double()).square().sum()) for a, b in pieces) ** 0.5)


class _Differentiable(ReplacedWeights):
    """Gives reads of the blocks ``theta + (r - 1) D`` with r in the graph, so that a backward pass reaches it."""

    def __init__(self, anchored: Anchored, ratios: dict[str, torch.Tensor]) -> None:
        super().__init__([block for block, _ in anchored.pairs])
        self._anchors = {block.name: anchor for block, anchor in anchored.pairs}
        self._ratios = ratios

    def replacement(self, block: Block) -> torch.Tensor:
        """Return the block with its displacement rescaled."""
        theta, ratio = block.parameter.detach(), self._ratios[block.name]
        wide = theta.to(work_dtype(theta.dtype))
        displacement = wide - self._anchors[block.name].to(wide.dtype)
        return (wide + displacement * (ratio - 1)).to(theta.dtype)


def ratio_gradient(anchored: Anchored, ratios: Any, closure: Callable[[], Any]) -> tuple[float, Any]:
    """Return the loss with the displacements at ``ratios``, and its gradient by them: one forward, one backward.

    Raises:
        ConfigError: the closure gives a number that has no gradient.
    """
    leaves = {
        block.name: torch.tensor(
            ratio, dtype=work_dtype(block.parameter.dtype), device=block.parameter.device, requires_grad=True
        )
        for (block, _), ratio in zip(anchored.pairs, ratios, strict=True)
    }
    with torch.enable_grad(), _Differentiable(anchored, leaves):
        loss = closure()
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        raise ConfigError(
            "dizo-fo takes gradients, and the objective gives a number without one; minimise the loss, or try dizo"
        )
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return float(loss.detach()), np.array([0.0 if g is None else float(g) for g in gradients])
