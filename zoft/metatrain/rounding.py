"""Stochastic rounding of float32 weights for bf16 autocast, so that updates below a bf16 step reach the loss.

Autocast rounds weights to the nearest bf16 number. The weights of a base are such numbers, and a teacher's step of 1e-5
is far below half the distance to the next: the loss would not change, until a probe perturbs the weights and reveals
all accumulated steps at once. Rounded up or down by a seeded draw instead, weights keep their value in the mean.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from zoft.noise.rounding import Dither
from zoft.noise.table import chunk_length
from zoft.weights.blocks import Block
from zoft.weights.replaced import ReplacedWeights
from zoft.weights.streamed import copy_to_device

# Functions of a weight that autocast computes in half precision. All others read the float32 weights.
_ROUNDED = {
    torch.nn.functional.linear,
    torch.nn.functional.conv1d,
    torch.conv1d,
    torch.addmm,
    torch.baddbmm,
    torch.bmm,
    torch.einsum,
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
}


def rounding(blocks: Sequence[Block], dtype: str, seed: int) -> AbstractContextManager[Any]:
    """Return the context for evaluating losses and gradients in ``dtype``: `RoundedWeights` for bf16, else none."""
    return RoundedWeights(blocks, seed) if dtype == "bf16" else nullcontext()


class RoundedWeights(ReplacedWeights):
    """Context in which matrix products read the matrices among ``blocks`` rounded stochastically to bf16.

    The draw is a fixed function of (seed, block), so that losses before and after a step differ by the step alone.
    Gradients pass through unchanged. Weights that a `PerturbedWeights` inside this context replaces are not rounded:
    its noise is larger than a bf16 step.
    """

    def __init__(self, blocks: Sequence[Block], seed: int) -> None:
        super().__init__([block for block in blocks if len(block.shape) > 1 and block.parameter.dtype == torch.float32])
        self._seed = seed

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with rounded blocks if it is a matrix product, else with the stored ones."""
        reader = args[2] if func is copy_to_device else func  # a copy for the device is rounded if a product reads it
        return super().call(func, args, kwargs) if reader in _ROUNDED else func(*args, **kwargs)

    def replacement(self, block: Block) -> torch.Tensor:
        """Return the block rounded to bf16; its gradient goes to the parameter."""
        rounded: torch.Tensor = _Round.apply(block.parameter, block, self._seed)
        return rounded


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, block: Block, seed: int) -> torch.Tensor:
        return rounded(weight, block, seed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.float(), None, None


def rounded(weight: torch.Tensor, block: Block, seed: int) -> torch.Tensor:
    """Return the float32 ``weight`` of ``block`` rounded to bf16 by the dither of (seed, block)."""
    dither, length = Dither(block, f"{seed}/weights/dither/{block.name}", seed), chunk_length(block)
    flat = weight.detach().view(-1)
    out = torch.empty(block.shape, dtype=torch.bfloat16, device=weight.device)
    for lo in range(0, block.size, length):
        hi = min(block.size, lo + length)
        dither.round_(flat[lo:hi].clone(), lo, out.view(-1)[lo:hi])
    return out
