"""SubZero: directions in random orthonormal subspaces (arXiv 2410.08989)."""

import math
from typing import ClassVar

import torch
from pydantic import Field

from zoft.optim.core.low_rank import Factors, LowRankDirections
from zoft.optim.core.method import Method, Published
from zoft.optim.core.parts import Host
from zoft.optim.core.record import Step
from zoft.weights.blocks import Block


class SubZero(LowRankDirections):
    """``u = sqrt(m n) / r U Z V^T`` with orthonormal U, V and ``Z ~ N(0, I)`` of r x r (arXiv 2410.08989).

    U and V are the Q factors of normal matrices, new every ``refresh`` steps; u has the Frobenius norm that plain noise
    has in the mean. In memory: U and V, (m + n) r numbers a matrix; not saved, but drawn again from the seed.

    >>> SubZero().rank
    8
    """

    what: ClassVar[str] = "subzero"
    squares: ClassVar[bool] = True

    rank: int = Field(8, ge=1, description="rank of the directions, r")
    refresh: int = Field(2000, ge=1, description="steps for which U and V stay, T0")

    def bases(self, host: Host, seed: int, epoch: int, block: Block) -> Factors:
        """Return U ``(m, r)`` and V ``(n, r)`` of the ``epoch``-th ``refresh`` steps."""
        kept: dict[str, tuple[int, Factors]] = host.scratch.setdefault("bases", {})
        if block.name not in kept or kept[block.name][0] != epoch:
            rows, columns = (
                torch.linalg.qr(self.drawn(host, seed, f"{epoch}/{side}", block, (size, self.rank)).double()).Q
                for side, size in zip(("left", "right"), self.sides(block), strict=True)
            )
            kept[block.name] = epoch, (rows.float(), columns.float())
        return kept[block.name][1]

    def factors(self, host: Host, step: Step, probe: int, block: Block) -> Factors:
        """Return ``sqrt(m n) / r U Z`` and V."""
        left, right = self.bases(host, step.seed, step.step // self.refresh, block)
        core = self.drawn(host, step.seed, f"{step.step}/{probe}/core", block, (self.rank, self.rank))
        size = math.sqrt(math.prod(self.sides(block))) / self.rank
        return left.double() @ core.double() * size, right  # small, and in float64 the same with any number of threads


METHOD = Method(
    "subzero",
    "directions in random orthonormal subspaces",
    "arXiv 2410.08989",
    parts=(SubZero,),
    published={"full": Published(1e-7)},
)
