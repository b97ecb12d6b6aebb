"""Adam on the estimated gradient: MeZO-Adam (arXiv 2305.17333, appendix B), and its scalar form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from zoft.optim.core.parts import Piece, Rule
from zoft.optim.core.record import StepRecord

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer


class AdamSteps(Rule):
    """``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, ``theta <- theta - lr m^ / (sqrt(v^) + eps)``.

    ``g = 1/q sum_p slope_p u_p``; ``m^`` and ``v^`` are corrected for their start at zero. State: m and v in float32,
    two numbers a weight. Weight decay is decoupled, so this is AdamW.

    >>> AdamSteps().beta2
    0.999
    """

    momentum: ClassVar[bool] = True

    beta1: float = Field(0.9, ge=0, lt=1, description="share of the first moment that is kept")
    beta2: float = Field(0.999, ge=0, lt=1, description="share of the second moment that is kept")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")

    def update(self, piece: Piece) -> None:
        """Update a piece of a block in place."""
        g, count = piece.gradient(), piece.updates + 1
        m, v = piece.state("momentum"), piece.state("second moment")
        m.mul_(self.beta1).add_(g * (1 - self.beta1))
        v.mul_(self.beta2).add_(g * g * (1 - self.beta2))
        root = (v / (1 - self.beta2**count)).sqrt_().add_(self.epsilon)
        piece.theta.sub_(m / root * (piece.lr / (1 - self.beta1**count)))


class ScalarAdam(Rule):
    """``v <- b v + (1 - b) mean_p slope_p^2``, ``theta <- theta - lr / (sqrt(v^) + epsilon) / q sum_p slope_p u_p``.

    The gradient estimate has one measured number a probe, so all coordinates have nearly the same second moment: one
    scalar does what Adam's second moment does (arXiv 2605.03869). No state but that number.

    >>> ScalarAdam().beta
    0.999
    """

    beta: float = Field(0.999, ge=0, lt=1, description="share of the second moment that is kept")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")

    def _moment(self, optimizer: ZOOptimizer, record: StepRecord) -> float:
        before = float(optimizer.memory.get("second moment", 0.0))
        squares = sum(slope**2 for slope in record.slopes) / len(record.slopes)
        return self.beta * before + (1 - self.beta) * squares

    def coefficients(self, optimizer: ZOOptimizer, record: StepRecord) -> tuple[float, ...]:
        """Return the slopes over q and over the root of their second moment."""
        corrected = self._moment(optimizer, record) / (1 - self.beta ** (optimizer.memory["updates"] + 1))
        root = math.sqrt(corrected) + self.epsilon
        return tuple(slope / root for slope in super().coefficients(optimizer, record))

    def observe(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        """Take the slopes of ``record`` into the second moment."""
        optimizer.memory["second moment"] = self._moment(optimizer, record)
