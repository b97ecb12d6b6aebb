"""ZO-SGD-Sign: the sign of the estimated gradient (ZO-Bench, arXiv 2402.11592)."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from zoft.optim.core.method import ZO_BENCH_GRID, Method, Published
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.pieces import Piece
from zoft.optim.core.record import StepRecord


class Sign(Rule):
    """``theta <- theta - lr sign(g)`` with ``g = 1/q sum_p slope_p u_p``: every weight moves by lr. No state.

    ``scalar`` is what the published code does: only the slope loses its size, ``theta <- theta - lr sign(slope) u``.

    >>> Sign(scalar=True).scalar
    True
    """

    scale_free: ClassVar[bool] = True

    scalar: bool = Field(False, description="take the sign of the slope alone, as the published code does")

    def coefficients(self, host: Host, record: StepRecord) -> tuple[float, ...]:
        """Return the slopes over q, or their signs."""
        if not self.scalar:
            return super().coefficients(host, record)
        return tuple(math.copysign(1, slope) * (slope != 0) / len(record.slopes) for slope in record.slopes)

    def update(self, host: Host, piece: Piece) -> None:
        """Update a piece of a block in place."""
        if self.scalar:
            super().update(host, piece)
        else:
            piece.theta.sub_(piece.gradient().sign_() * piece.lr)


METHOD = Method(
    "zo-sign",
    "every weight moves by lr",
    "arXiv 2402.11592",
    parts=(Sign,),
    published={"full": Published(grid=ZO_BENCH_GRID)},
)
