"""TeZO: directions of low rank over space and time (arXiv 2501.19057)."""

from typing import ClassVar

from pydantic import Field

from zoft.optim.core.low_rank import Factors, LowRankDirections
from zoft.optim.core.method import Method
from zoft.optim.core.parts import Host
from zoft.optim.core.record import Step
from zoft.weights.blocks import Block


class TeZO(LowRankDirections):
    """``u = U diag(tau) V^T`` with U and V fixed for the run and ``tau ~ N(0, I)`` of r numbers (arXiv 2501.19057).

    A probe draws r numbers a matrix: the directions of all steps are one tensor in CP form. U and V are N(0, 1), and
    ``theta <- theta - lr slope u / r`` as for LOZO. In memory: U and V, (m + n) r numbers a matrix; not saved. Blocks
    of adapters are seen as SubZero sees them.

    >>> import torch
    >>> TeZO(rank=16).weight(Block("w", torch.nn.Parameter(torch.zeros(20, 30))))
    0.0625
    """

    what: ClassVar[str] = "tezo"
    squares: ClassVar[bool] = True

    rank: int = Field(8, ge=1, description="rank of the directions, r")

    def weight(self, block: Block) -> float:
        """Return 1 / r on matrices."""
        return 1 / self.rank if self.low(block) else 1.0

    def factors(self, host: Host, step: Step, probe: int, block: Block) -> Factors:
        """Return ``U diag(tau)`` and V."""
        kept: dict[str, Factors] = host.scratch.setdefault("fixed", {})
        if block.name not in kept:
            rows, columns = (
                self.drawn(host, step.seed, f"fixed/{side}", block, (size, self.rank))
                for side, size in zip(("left", "right"), self.sides(block), strict=True)
            )
            kept[block.name] = rows, columns
        left, right = kept[block.name]
        tau = self.drawn(host, step.seed, f"{step.step}/{probe}/tau", block, (self.rank,))
        return left * tau, right


METHOD = Method(
    "tezo",
    "directions of low rank over space and time",
    "arXiv 2501.19057",
    parts=(TeZO,),
)
