"""Sparse-MeZO: only the smaller weights of every block are perturbed and updated (arXiv 2402.15751)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from zoft.noise.direction import Direction
from zoft.noise.table import Where, at, chunk_length
from zoft.optim.core.derived import Derived
from zoft.optim.core.method import Method
from zoft.optim.core.parts import Directions, Host
from zoft.optim.core.record import Step
from zoft.weights.blocks import Block


class SmallWeights(Directions):
    """``u = m z`` with ``m = 1[|theta| <= h]``; ``h`` of a block is a quantile of ``|theta|`` at the start of the run.

    The mask is computed from the stored weights, which no probe moves, where it is needed. State: h, one number a
    block. With ``keep = 1`` it is MeZO bit for bit. The paper leaves out 75 to 80 % of the weights.

    >>> SmallWeights().keep
    0.25
    """

    stateful: ClassVar[bool] = True

    keep: float = Field(0.25, gt=0, le=1, description="share of the weights of a block that is perturbed and updated")

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the direction of one probe."""
        z = host.isotropic(step, probe)
        if self.keep == 1:
            return z
        thresholds = {block.name: self._threshold(host, block) for block in host.probed}

        def masked(block: Block, where: Where) -> torch.Tensor:
            small = at(block.parameter, block, where).float().abs() <= thresholds[block.name]
            return z.u(block, where) * small

        return Derived(masked, z.idle)

    def _threshold(self, host: Host, block: Block) -> float:
        """That of the start of the run: asked for the first time before a step moves a weight."""
        state = host.state_of(block)
        if "threshold" not in state:
            state["threshold"] = torch.tensor(quantile(block, self.keep))
        return float(state["threshold"])


def quantile(block: Block, share: float) -> float:
    """Return the smallest float32 h with ``|theta| <= h`` for at least ``share`` of the weights of ``block``.

    By halving the range of bit patterns, which are ordered as the numbers are: 31 passes, each over a chunk at a time,
    so that no copy of the block is made.

    >>> quantile(Block("w", torch.nn.Parameter(torch.tensor([3.0, -1.0, 2.0, -4.0]))), 0.5)
    2.0
    """
    weights, length = block.parameter.detach().view(-1), chunk_length(block)
    wanted = max(1, round(share * block.size))
    low, high = 0, 0x7F800000  # of float32: zero, infinity
    while low < high:
        middle = (low + high) // 2
        count = sum(
            int((weights[lo : lo + length].float().abs().view(torch.int32) <= middle).sum())
            for lo in range(0, block.size, length)
        )
        low, high = (low, middle) if count >= wanted else (middle + 1, high)
    return float(torch.tensor(low, dtype=torch.int32).view(torch.float32))


METHOD = Method(
    "sparse-mezo",
    "MeZO on the smaller weights of every block",
    "arXiv 2402.15751",
    parts=(SmallWeights,),
)
