"""LOZO-M: LOZO with momentum in the left factor alone (arXiv 2410.07698, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.optim.core.derived import LowRank
from zoft.optim.core.lowrank import LOZO
from zoft.optim.core.parts import Piece, Rule, Term
from zoft.optim.core.record import StepRecord
from zoft.optim.methods.momentum import Momentum
from zoft.weights.blocks import Block
from zoft.weights.dtypes import work_dtype

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer
    from zoft.optim.core.oracle import Look


class LOZOMomentum(Momentum):
    """``N <- beta N + (1 - beta) slope U / r``, ``theta <- theta - lr N V^T``; other blocks have plain momentum.

    Where V changes, N is carried over to the new one: ``N <- beta N (V_old^T V_new) / n + (1 - beta) slope U / r``.
    State: N, m r numbers a matrix, and one number a weight of other blocks. With ``beta = 0`` it is LOZO bit for bit.

    >>> LOZOMomentum().beta
    0.9
    """

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """As LOZO measures."""
        if not isinstance(optimizer.directions, LOZO):
            raise ConfigError("the momentum of lozo-m is in the factors of lozo: give LOZO as directions, too")
        return super().measure(optimizer, look, record)

    def terms(
        self, optimizer: ZOOptimizer, block: Block, record: StepRecord, directions: Sequence[Direction]
    ) -> list[Term]:
        """Return the momentum of a matrix as a direction of its own."""
        terms = super().terms(optimizer, block, record, directions)
        lozo = optimizer.directions
        assert isinstance(lozo, LOZO)
        if not self.beta or not lozo.low(block):
            return terms
        n = self._carried(optimizer, record, block, lozo)
        added = torch.zeros_like(n)
        for coefficient, direction in terms:
            assert isinstance(direction, LowRank)
            left, _ = direction.factors(block) or (added, added)
            added.add_(left * coefficient)
        n.mul_(self.beta).add_(added * (1.0 if self.heavy_ball else 1 - self.beta))
        right = lozo.right(optimizer, record.seed, record.step // lozo.refresh, block)
        return [(1.0, LowRank(directions[0], lambda _: (n, right)))]

    def _carried(self, optimizer: ZOOptimizer, record: StepRecord, block: Block, lozo: LOZO) -> torch.Tensor:
        """N of the step before, in terms of this step's V."""
        state = optimizer.state[block.parameter]
        if "left momentum" not in state:
            shape = (lozo.sides(block)[0], lozo.rank)
            dtype, device = work_dtype(block.parameter.dtype), block.parameter.device
            state["left momentum"] = torch.zeros(shape, dtype=dtype, device=device)
        n: torch.Tensor = state["left momentum"]
        epoch, last = record.step // lozo.refresh, optimizer.memory.get("epoch", 0)
        if epoch != last:
            old = lozo.drawn(optimizer, record.seed, f"{last}/right", block, (lozo.sides(block)[1], lozo.rank))
            new = lozo.right(optimizer, record.seed, epoch, block)
            n.copy_(n @ (old.to(n.dtype).T @ new.to(n.dtype) / len(new)))
        return n

    def observe(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        """Remember which V the momentum is in terms of."""
        assert isinstance(optimizer.directions, LOZO)
        optimizer.memory["epoch"] = record.step // optimizer.directions.refresh

    def update(self, piece: Piece) -> None:
        """Update a piece of a block in place: a matrix along its momentum, another block by plain momentum."""
        lozo = piece.optimizer.directions
        if isinstance(lozo, LOZO) and lozo.low(piece.block):
            Rule.update(self, piece)
        else:
            super().update(piece)
