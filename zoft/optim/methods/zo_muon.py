"""ZO-Muon: the estimate in a random subspace, orthogonalised (arXiv 2602.17155)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.noise.table import at, chunk_length
from zoft.optim.core.derived import Derived, LowRank
from zoft.optim.core.low_rank import Factors, LowRankDirections, sides
from zoft.optim.core.method import Method, Published
from zoft.optim.core.parts import Host, Rule
from zoft.optim.core.pieces import Term
from zoft.optim.core.record import Step, StepRecord
from zoft.weights.blocks import Block

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Subspace(LowRankDirections):
    """``u = P Psi`` with orthonormal P ``(m, r)``, new every ``refresh`` steps, and ``Psi ~ N(0, I)`` ``(r, n)``.

    Nothing is stored: P and Psi are drawn again from the seed; in memory P and the Psi of all probes of a step.

    >>> Subspace(rank=4).low(Block("w", torch.nn.Parameter(torch.zeros(8, 8))))
    True
    """

    what: ClassVar[str] = "zo-muon"

    rank: int = Field(64, ge=1, description="dimensions of the subspace, r")
    refresh: int = Field(100, ge=1, description="steps for which the subspace stays")

    def factors(self, host: Host, step: Step, probe: int, block: Block) -> Factors:
        """Return P and the transposed Psi."""
        (m, n), epoch = sides(block), step.step // self.refresh
        kept: dict[str, tuple[int, torch.Tensor]] = host.scratch.setdefault("subspace", {})
        if block.name not in kept or kept[block.name][0] != epoch:
            drawn = self.drawn(host, step.seed, f"{epoch}/left", block, (m, self.rank))
            kept[block.name] = epoch, torch.linalg.qr(drawn.double()).Q.float()
        right = self.drawn(host, step.seed, f"{step.step}/{probe}/right", block, (n, self.rank))
        return kept[block.name][1], right


class Orthogonal(Rule):
    """``W <- W - lr P msign(1/q sum_p slope_p Psi_p)``: every singular value of the update is about 1.

    ``msign`` by Newton-Schulz steps. Vectors have no singular values: they take MeZO's step at ``vector_ratio lr``. No
    state. With no Newton-Schulz steps at full rank and ``vector_ratio = 1`` it is MeZO bit for bit.

    >>> Orthogonal().newton_schulz
    5
    """

    newton_schulz: int = Field(5, ge=0, description="steps of the iteration; 0: the estimate as it is")
    vector_ratio: float = Field(1e-5, ge=0, description="learning rate of vectors, as a multiple of lr")

    def check(self, host: Host) -> None:
        """Raise `ConfigError` where the directions are not those of a subspace."""
        if not isinstance(host.directions, Subspace):
            raise ConfigError("the rule of zo-muon works in the subspace of its directions: give Subspace, too")

    def terms(self, host: Host, block: Block, record: StepRecord, directions: Sequence[Direction]) -> list[Term]:
        """Return the orthogonalised estimate of a matrix as a direction; MeZO's terms for a vector."""
        assert isinstance(host.directions, Subspace)  # `check`
        terms = super().terms(host, block, record, directions)
        if len(block.shape) < 2:
            return [(coefficient * self.vector_ratio, direction) for coefficient, direction in terms]
        if not self.newton_schulz or not any(coefficient for coefficient, _ in terms):
            return terms
        if not host.directions.low(block):
            parts = [_whole(block, direction) * coefficient for coefficient, direction in terms]
            dense = msign(sum(parts[1:], start=parts[0]).view(sides(block)), self.newton_schulz).contiguous()
            return [(1.0, Derived(lambda one, where: at(dense, one, where), directions[0].idle))]
        assert all(isinstance(direction, LowRank) for direction in directions)
        factors = [(c, direction.factors(block)) for c, direction in terms if isinstance(direction, LowRank)]
        known = [(c, pair) for c, pair in factors if pair is not None]
        mean = sum((pair[1] * c for c, pair in known[1:]), start=known[0][1][1] * known[0][0])
        left, right = known[0][1][0], msign(mean, self.newton_schulz)
        return [(1.0, LowRank(directions[0], lambda _: (left, right)))]


def _whole(block: Block, direction: Direction) -> torch.Tensor:
    """The direction on a whole block, flat."""
    length = chunk_length(block)
    pieces = (slice(lo, min(block.size, lo + length)) for lo in range(0, block.size, length))
    return torch.cat([direction.u(block, piece) for piece in pieces])


def msign(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Return ``matrix`` with its singular values driven towards 1 by ``steps`` Newton-Schulz iterations.

    >>> torch.linalg.svdvals(msign(torch.diag(torch.tensor([3.0, 0.5])), 5)).gt(0.6).tolist()
    [True, True]
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


METHOD = Method(
    "zo-muon",
    "the estimate in a subspace, orthogonalised",
    "arXiv 2602.17155",
    parts=(Subspace, Orthogonal),
    published={  # those of adapters are ours: steps have the spectral norm of the rate, whatever the block
        "full": Published(1e-2),
        "lora": Published(1e-2, 1e-2),
        "prefix": Published(1e-1, 1e-1),
    },
    probes=4,
)
