"""Check that `PerturbedWeights` perturbs every read of every block."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from zoft.errors import ModelError
from zoft.weights.blocks import Block
from zoft.weights.dtypes import HALF
from zoft.weights.perturbed import PerturbedWeights

_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}
_NOT_ZERO = 0.01
_FLIPPED = {torch.float32: 5 << 18, torch.bfloat16: 5, torch.float16: 5 << 5, torch.float64: 5 << 47}


class _FlippedBits:
    """Source of weights with two mantissa bits flipped: a perturbation of some percent that is exactly reversible.

    ``half``: whether some blocks were read for a computation in half precision.
    """

    def __init__(self) -> None:
        self.half = False

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        self._note(block.parameter)
        out.copy_(block.parameter.detach().view(-1)[start:stop])
        _flip_(out)
        return out

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        self._note(block.parameter)
        out = block.parameter.detach()[rows]
        _flip_(out)
        return out

    def _note(self, weights: torch.Tensor) -> None:
        self.half |= weights.dtype in HALF or torch.is_autocast_enabled(weights.device.type)


def _flip_(tensor: torch.Tensor) -> None:
    tensor.view(_BITS[tensor.dtype]).bitwise_xor_(_FLIPPED[tensor.dtype])


@contextmanager
def _away_from_zero(blocks: Sequence[Block]) -> Iterator[None]:
    """Fill blocks that are all zero, such as B of LoRA: flipped bits of B or A would not change the loss."""
    zeros = [block for block in blocks if not bool(block.parameter.detach().any())]
    try:
        for block in zeros:
            block.parameter.detach().fill_(_NOT_ZERO)
        yield
    finally:
        for block in zeros:
            block.parameter.detach().zero_()


@contextmanager
def _flipped_in_place(blocks: Sequence[Block]) -> Iterator[None]:
    flipped: list[Block] = []
    try:
        for block in blocks:
            _flip_(block.parameter.detach())
            flipped.append(block)
        yield
    finally:
        for block in flipped:
            _flip_(block.parameter.detach())


def verify_coverage(blocks: Sequence[Block], closure: Callable[[], float]) -> str | None:
    """Check that `PerturbedWeights` perturbs every read of every block; return a warning or None.

    The same perturbation is evaluated once with `PerturbedWeights` and once in place. It flips bits of the weights, so
    that undoing it is exact in every dtype and takes no memory. Two evaluations, three if they differ.

    Raises:
        ModelError: the two losses differ though the objective is deterministic.
    """
    source = _FlippedBits()
    mode = PerturbedWeights(blocks, source, 0.0)
    with torch.no_grad(), _away_from_zero(blocks):
        with mode:
            intercepted = float(closure())
        with _flipped_in_place(blocks):
            in_place = float(closure())
            if _agree(intercepted, in_place, source.half):
                return None
            again = float(closure())
    if not _agree(again, in_place, source.half):
        return (
            f"the objective is not deterministic ({in_place:.6g}, then {again:.6g} on the same weights and data): "
            "the slope of a probe will be mostly noise unless dropout and sampling are off"
        )
    unread = [block.name for block in blocks if block.name not in mode.used]
    raise ModelError(
        f"this model reads weights in a way that zoft cannot perturb: loss {intercepted:.6g} with intercepted reads, "
        f"{in_place:.6g} in place" + (f"; blocks never read: {', '.join(unread[:5])}" if unread else "") + "; "
        "try an eager attention implementation without compiled or scripted layers"
    )


def _agree(a: float, b: float, half: bool) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= (2e-2 if half else 1e-4) * (1 + abs(b))
