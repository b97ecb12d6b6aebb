"""Directions of low rank on matrices: LOZO, SubZero and TeZO; vectors and small matrices get plain noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from zoft.errors import ModelError
from zoft.noise.direction import Direction
from zoft.noise.table import normal_numbers
from zoft.optim.core.derived import LowRank
from zoft.optim.core.parts import Directions
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer

Factors = tuple[torch.Tensor, torch.Tensor]


class LowRankDirections(Directions):
    """``u = L R^T`` on every block that is a matrix of more than ``rank`` rows and columns, plain noise elsewhere.

    A block of more dimensions is the matrix of its first dimension by the others. Where the rank is not below both
    sides nothing would be saved, and u is plain noise: full rank is MeZO bit for bit.
    """

    what: ClassVar[str] = "this method"
    squares: ClassVar[bool] = False  # whether the thin blocks of adapters are seen as squarer matrices

    rank: int = Field(2, ge=1, description="rank of the directions, r")

    def check(self, blocks: Sequence[Block]) -> None:
        """Raise `ModelError` where no block is a matrix."""
        if not any(len(block.shape) > 1 for block in blocks):
            raise ModelError(
                f"{self.what} needs matrices, and all {len(blocks)} trainable blocks are vectors (such as "
                f"{blocks[0].name!r}); try mezo"
            )

    def low(self, block: Block) -> bool:
        """Whether directions are of low rank on ``block``."""
        return len(block.shape) > 1 and self.rank < min(self.sides(block))

    def sides(self, block: Block) -> tuple[int, int]:
        """Return rows and columns of ``block`` seen as the matrix that has the factors."""
        return squarest(block.size) if self.squares and block.in_adapter else sides(block)

    def direction(self, optimizer: ZOOptimizer, record: StepRecord, probe: int) -> Direction:
        """Return the direction of one probe; a tuner's scales multiply it."""
        scales = optimizer.named_scales(record)

        def factors(block: Block) -> Factors | None:
            if not self.low(block):
                return None
            left, right = self.factors(optimizer, record, probe, block)
            scale = scales.get(block.name, 1.0)
            return (left if scale == 1 else left * scale), right

        return LowRank(optimizer.isotropic(record, probe), factors)

    def factors(self, optimizer: ZOOptimizer, record: StepRecord, probe: int, block: Block) -> Factors:
        """Return L ``(m, r)`` and R ``(n, r)`` of ``block``."""
        raise NotImplementedError

    def drawn(self, optimizer: ZOOptimizer, seed: int, key: str, block: Block, shape: tuple[int, ...]) -> torch.Tensor:
        """Return normal numbers, a function of the seed, ``key`` and the block."""
        key = f"{key}/{block.name}"
        return normal_numbers(seed, key, shape, block.parameter.device, optimizer.table_dtype)


def sides(block: Block) -> tuple[int, int]:
    """Return rows and columns of ``block`` seen as a matrix.

    >>> sides(Block("w", torch.nn.Parameter(torch.zeros(4, 3, 2))))
    (4, 6)
    """
    return block.shape[0], math.prod(block.shape[1:])


def squarest(size: int) -> tuple[int, int]:
    """Return the rows and columns of the most nearly square matrix of ``size`` numbers, the fewer first.

    >>> squarest(8 * 576)
    (64, 72)
    """
    rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
    return rows, size // rows


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

    def right(self, optimizer: ZOOptimizer, seed: int, epoch: int, block: Block) -> torch.Tensor:
        """Return V ``(n, r)`` of the ``epoch``-th ``refresh`` steps."""
        kept: dict[str, tuple[int, torch.Tensor]] = optimizer.scratch.setdefault("right", {})
        if block.name not in kept or kept[block.name][0] != epoch:
            shape = (self.sides(block)[1], self.rank)
            kept[block.name] = epoch, self.drawn(optimizer, seed, f"{epoch}/right", block, shape)
        return kept[block.name][1]

    def factors(self, optimizer: ZOOptimizer, record: StepRecord, probe: int, block: Block) -> Factors:
        """Return U ``(m, r)`` and V ``(n, r)``."""
        shape = (self.sides(block)[0], self.rank)
        left = self.drawn(optimizer, record.seed, f"{record.step}/{probe}/left", block, shape)
        return left, self.right(optimizer, record.seed, record.step // self.refresh, block)


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

    def bases(self, optimizer: ZOOptimizer, seed: int, epoch: int, block: Block) -> Factors:
        """Return U ``(m, r)`` and V ``(n, r)`` of the ``epoch``-th ``refresh`` steps."""
        kept: dict[str, tuple[int, Factors]] = optimizer.scratch.setdefault("bases", {})
        if block.name not in kept or kept[block.name][0] != epoch:
            rows, columns = (
                torch.linalg.qr(self.drawn(optimizer, seed, f"{epoch}/{side}", block, (size, self.rank)).double()).Q
                for side, size in zip(("left", "right"), self.sides(block), strict=True)
            )
            kept[block.name] = epoch, (rows.float(), columns.float())
        return kept[block.name][1]

    def factors(self, optimizer: ZOOptimizer, record: StepRecord, probe: int, block: Block) -> Factors:
        """Return ``sqrt(m n) / r U Z`` and V."""
        left, right = self.bases(optimizer, record.seed, record.step // self.refresh, block)
        core = self.drawn(optimizer, record.seed, f"{record.step}/{probe}/core", block, (self.rank, self.rank))
        size = math.sqrt(math.prod(self.sides(block))) / self.rank
        return left.double() @ core.double() * size, right  # small, and in float64 the same with any number of threads


class TeZO(LowRankDirections):
    """``u = U diag(tau) V^T`` with U and V fixed for the run and ``tau ~ N(0, I)`` of r numbers (arXiv 2501.19057).

    A probe draws r numbers a matrix: the directions of all steps are one tensor in CP form. U and V are N(0, 1), and
    ``theta <- theta - lr slope u / r`` as for LOZO. In memory: U and V, (m + n) r numbers a matrix; not saved. Blocks
    of adapters are seen as SubZero sees them.

    >>> TeZO(rank=16).weight(Block("w", torch.nn.Parameter(torch.zeros(20, 30))))
    0.0625
    """

    what: ClassVar[str] = "tezo"
    squares: ClassVar[bool] = True

    rank: int = Field(8, ge=1, description="rank of the directions, r")

    def weight(self, block: Block) -> float:
        """Return 1 / r on matrices."""
        return 1 / self.rank if self.low(block) else 1.0

    def factors(self, optimizer: ZOOptimizer, record: StepRecord, probe: int, block: Block) -> Factors:
        """Return ``U diag(tau)`` and V."""
        kept: dict[str, Factors] = optimizer.scratch.setdefault("fixed", {})
        if block.name not in kept:
            rows, columns = (
                self.drawn(optimizer, record.seed, f"fixed/{side}", block, (size, self.rank))
                for side, size in zip(("left", "right"), self.sides(block), strict=True)
            )
            kept[block.name] = rows, columns
        left, right = kept[block.name]
        tau = self.drawn(optimizer, record.seed, f"{record.step}/{probe}/tau", block, (self.rank,))
        return left * tau, right
