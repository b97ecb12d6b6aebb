"""LOZO-M: LOZO with momentum in the left factor alone (arXiv 2410.07698, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.optim.core.derived import LowRank
from zoft.optim.core.method import Method, Published
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.pieces import Piece, Term
from zoft.optim.core.record import StepRecord
from zoft.optim.methods.lozo import LOZO
from zoft.optim.methods.mezo_momentum import Momentum
from zoft.weights.blocks import Block
from zoft.weights.dtypes import work_dtype


class LOZOMomentum(Momentum):
    """``N <- beta N + (1 - beta) slope U / r``, ``theta <- theta - lr N V^T``; other blocks have plain momentum.

    Where V changes, N is carried over to the new one: ``N <- beta N (V_old^T V_new) / n + (1 - beta) slope U / r``.
    State: N, m r numbers a matrix, and one number a weight of other blocks. With ``beta = 0`` it is LOZO bit for bit.

    >>> LOZOMomentum().beta
    0.9
    """

    def check(self, host: Host) -> None:
        """Raise `ConfigError` where the directions are not LOZO's."""
        if not isinstance(host.directions, LOZO):
            raise ConfigError("the momentum of lozo-m is in the factors of lozo: give LOZO as directions, too")

    def terms(self, host: Host, block: Block, record: StepRecord, directions: Sequence[Direction]) -> list[Term]:
        """Return the momentum of a matrix as a direction of its own."""
        terms = super().terms(host, block, record, directions)
        lozo = host.directions
        assert isinstance(lozo, LOZO)
        if not self.beta or not lozo.low(block):
            return terms
        n = self._carried(host, record, block, lozo)
        added = torch.zeros_like(n)
        for coefficient, direction in terms:
            assert isinstance(direction, LowRank)
            left, _ = direction.factors(block) or (added, added)
            added.add_(left * coefficient)
        n.mul_(self.beta).add_(added * (1.0 if self.heavy_ball else 1 - self.beta))
        right = lozo.right(host, record.seed, record.step // lozo.refresh, block)
        return [(1.0, LowRank(directions[0], lambda _: (n, right)))]

    def _carried(self, host: Host, record: StepRecord, block: Block, lozo: LOZO) -> torch.Tensor:
        """N of the step before, in terms of this step's V."""
        state = host.state_of(block)
        if "left momentum" not in state:
            shape = (lozo.sides(block)[0], lozo.rank)
            dtype, device = work_dtype(block.parameter.dtype), block.parameter.device
            state["left momentum"] = torch.zeros(shape, dtype=dtype, device=device)
        n: torch.Tensor = state["left momentum"]
        epoch, last = record.step // lozo.refresh, host.memory.get("epoch", 0)
        if epoch != last:
            old = lozo.drawn(host, record.seed, f"{last}/right", block, (lozo.sides(block)[1], lozo.rank))
            new = lozo.right(host, record.seed, epoch, block)
            n.copy_(n @ (old.to(n.dtype).T @ new.to(n.dtype) / len(new)))
        return n

    def observe(self, host: Host, record: StepRecord) -> None:
        """Remember which V the momentum is in terms of."""
        assert isinstance(host.directions, LOZO)
        host.memory["epoch"] = record.step // host.directions.refresh

    def update(self, host: Host, piece: Piece) -> None:
        """Update a piece of a block in place: a matrix along its momentum, another block by plain momentum."""
        lozo = host.directions
        if isinstance(lozo, LOZO) and lozo.low(piece.block):
            Rule.update(self, host, piece)
        else:
            super().update(host, piece)


METHOD = Method(
    "lozo-m",
    "LOZO with momentum in the left factor",
    "arXiv 2410.07698",
    parts=(LOZO, LOZOMomentum),
    published={"full": Published(grid=(1e-7, 1e-6))},
)
