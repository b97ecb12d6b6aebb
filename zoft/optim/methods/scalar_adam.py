"""MeZO over the root mean square of its slopes: the scalar form of Adam (arXiv 2605.03869)."""

import math
from typing import ClassVar

from pydantic import Field

from zoft.optim.core.method import Method, Published
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.record import StepRecord


class ScalarAdam(Rule):
    """``v <- b v + (1 - b) mean_p slope_p^2``, ``theta <- theta - lr / (sqrt(v^) + epsilon) / q sum_p slope_p u_p``.

    The gradient estimate has one measured number a probe, so all coordinates have nearly the same second moment: one
    scalar does what Adam's second moment does (arXiv 2605.03869). No state but that number.

    >>> ScalarAdam().beta
    0.999
    """

    scale_free: ClassVar[bool] = True

    beta: float = Field(0.999, ge=0, lt=1, description="share of the second moment that is kept")
    epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")

    def _moment(self, host: Host, record: StepRecord) -> float:
        before = float(host.memory.get("second moment", 0.0))
        squares = sum(slope**2 for slope in record.slopes) / len(record.slopes)
        return self.beta * before + (1 - self.beta) * squares

    def coefficients(self, host: Host, record: StepRecord) -> tuple[float, ...]:
        """Return the slopes over q and over the root of their second moment."""
        corrected = self._moment(host, record) / (1 - self.beta ** (host.updates + 1))
        root = math.sqrt(corrected) + self.epsilon
        return tuple(slope / root for slope in super().coefficients(host, record))

    def observe(self, host: Host, record: StepRecord) -> None:
        """Take the slopes of ``record`` into the second moment."""
        host.memory["second moment"] = self._moment(host, record)


METHOD = Method(
    "scalar-adam",
    "MeZO over the root mean square of its slopes",
    "arXiv 2605.03869",
    parts=(ScalarAdam,),
    published={"full": Published(1e-5)},
)
