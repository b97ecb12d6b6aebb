"""MeZO with momentum: the estimated gradient is averaged over steps (arXiv 2305.17333, section 2.2)."""

from typing import ClassVar

from pydantic import Field

from zoft.optim.core.method import ZO_BENCH_GRID, Method, Published
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.pieces import Piece


class Momentum(Rule):
    """``m <- beta m + (1 - beta) g``, ``theta <- theta - lr m`` with ``g = 1/q sum_p slope_p u_p``.

    State: m, one number a weight. ``heavy_ball`` is the form of ZO-Bench (ZO-SGD-MMT, arXiv 2402.11592):
    ``m <- beta m + g``, whose steps are 1 / (1 - beta) times as long. With ``beta = 0`` there is no state, and it is
    MeZO bit for bit.

    >>> Momentum(beta=0.5).heavy_ball
    False
    """

    momentum: ClassVar[bool] = True

    beta: float = Field(0.9, ge=0, lt=1, description="share of the momentum that is kept in a step")
    heavy_ball: bool = Field(False, description="add the whole gradient to the momentum, as ZO-Bench does")

    def update(self, host: Host, piece: Piece) -> None:
        """Update a piece of a block in place."""
        if not self.beta:
            super().update(host, piece)
            return
        m = piece.of(host.remembered("momentum", piece.block))
        m.mul_(self.beta).add_(piece.gradient() * (1.0 if self.heavy_ball else 1 - self.beta))
        piece.theta.sub_(m * piece.lr)


METHOD = Method(
    "mezo-momentum",
    "MeZO with momentum; d numbers more",
    "arXiv 2305.17333",
    parts=(Momentum,),
    published={"full": Published(grid=ZO_BENCH_GRID)},
)
