"""A piece of a block, and the terms of an update on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zoft.noise.direction import Direction
from zoft.weights.blocks import Block

Term = tuple[float, Direction]  # an update is -lr * sum of coefficient * u


@dataclass(frozen=True)
class ProbePiece:
    """A term on a piece of a block: there ``u = factor * z``, and the update is ``-lr * slope * u``.

    ``z`` may be a view of the noise table, of its dtype and any strides; ``work`` is a flat buffer for `times`.
    """

    slope: float
    z: torch.Tensor
    factor: float
    work: torch.Tensor

    def times(self, number: float) -> torch.Tensor:
        """Return ``z * number``, flat, in the dtype of the weights; valid until the next call for any probe."""
        product = self.work.view(self.z.shape)
        if self.z.dtype == product.dtype:
            torch.mul(self.z, number, out=product)
        else:
            product.copy_(self.z).mul_(number)
        return self.work


@dataclass(frozen=True)
class Piece:
    """A piece of a block that a rule updates in place: flat range ``lo:hi``, weights in float32 or float64."""

    theta: torch.Tensor
    probes: Sequence[ProbePiece]
    lr: float
    block: Block
    lo: int
    hi: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this piece of ``tensor``, which has the size of the block; a view."""
        return tensor.view(-1)[self.lo : self.hi]

    def gradient(self) -> torch.Tensor:
        """Return the estimated gradient on this piece: the sum of ``slope * u``."""
        total = torch.zeros_like(self.theta)
        for probe in self.probes:
            total.add_(probe.times(probe.slope * probe.factor))
        return total
