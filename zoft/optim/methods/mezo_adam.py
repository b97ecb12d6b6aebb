"""MeZO-Adam: Adam on the estimated gradient (arXiv 2305.17333, appendix B)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from zoft.optim.core.method import ZO_BENCH_GRID, Method, Published
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.pieces import Piece


class AdamSteps(Rule):
    """``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, ``theta <- theta - lr m^ / (sqrt(v^) + eps)``.

    ``g = 1/q sum_p slope_p u_p``; ``m^`` and ``v^`` are corrected for their start at zero. State: m and v in float32,
    two numbers a weight. Weight decay is decoupled, so this is AdamW.

    >>> AdamSteps().beta2
    0.999
    """

    momentum: ClassVar[bool] = True
    scale_free: ClassVar[bool] = True

    beta1: float = Field(0.9, ge=0, lt=1, description="share of the first moment that is kept")
    beta2: float = Field(0.999, ge=0, lt=1, description="share of the second moment that is kept")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")

    def update(self, host: Host, piece: Piece) -> None:
        """Update a piece of a block in place."""
        g, count = piece.gradient(), host.updates + 1
        m, v = (piece.of(host.remembered(name, piece.block)) for name in ("momentum", "second moment"))
        m.mul_(self.beta1).add_(g * (1 - self.beta1))
        v.mul_(self.beta2).add_(g * g * (1 - self.beta2))
        root = (v / (1 - self.beta2**count)).sqrt_().add_(self.epsilon)
        piece.theta.sub_(m / root * (piece.lr / (1 - self.beta1**count)))


METHOD = Method(
    "mezo-adam",
    "Adam on MeZO's estimate; 2d numbers more",
    "arXiv 2305.17333",
    parts=(AdamSteps,),
    published={"full": Published(1e-5, grid=ZO_BENCH_GRID)},
)
