"""LOZO: low-rank directions whose right factor stays for many steps (arXiv 2410.07698)."""

from typing import ClassVar

import torch
from pydantic import Field

from zoft.optim.core.low_rank import Factors, LowRankDirections
from zoft.optim.core.method import Method, Published
from zoft.optim.core.parts import Host
from zoft.optim.core.record import Step
from zoft.weights.blocks import Block


class LOZO(LowRankDirections):
    """``u = U V^T``, U fresh in every step, V every ``refresh`` steps (arXiv 2410.07698).

    ``theta <- theta - lr slope U V^T / r``. U and V are N(0, 1), so the entries of u have variance r, and a probe is
    sqrt(r) times as long as MeZO's. V has a generator of its own, so that probe and update see the same u in every step
    (the published code does not where V changes). Nothing is stored: V is a function of (seed, step // refresh).

    >>> LOZO(rank=4).refresh
    50
    """

    what: ClassVar[str] = "lozo"

    refresh: int = Field(50, ge=1, description="steps for which V stays, nu")
    divide: bool = Field(True, description="divide the update by the rank; the published code does not")

    def weight(self, block: Block) -> float:
        """Return 1 / r on matrices."""
        return 1 / self.rank if self.divide and self.low(block) else 1.0

    def right(self, host: Host, seed: int, epoch: int, block: Block) -> torch.Tensor:
        """Return V ``(n, r)`` of the ``epoch``-th ``refresh`` steps."""
        kept: dict[str, tuple[int, torch.Tensor]] = host.scratch.setdefault("right", {})
        if block.name not in kept or kept[block.name][0] != epoch:
            shape = (self.sides(block)[1], self.rank)
            kept[block.name] = epoch, self.drawn(host, seed, f"{epoch}/right", block, shape)
        return kept[block.name][1]

    def factors(self, host: Host, step: Step, probe: int, block: Block) -> Factors:
        """Return U ``(m, r)`` and V ``(n, r)``."""
        shape = (self.sides(block)[0], self.rank)
        left = self.drawn(host, step.seed, f"{step.step}/{probe}/left", block, shape)
        return left, self.right(host, step.seed, step.step // self.refresh, block)


METHOD = Method(
    "lozo",
    "directions of low rank, U V^T",
    "arXiv 2410.07698",
    parts=(LOZO,),
    published={"full": Published(grid=(1e-7, 1e-6))},
)
