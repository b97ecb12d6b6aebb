"""Directions of low rank on matrices; vectors and small matrices get plain noise."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from zoft.errors import ModelError
from zoft.noise.direction import Direction
from zoft.noise.table import normal_numbers
from zoft.optim.core.derived import LowRank
from zoft.optim.core.parts import Directions, Host
from zoft.optim.core.record import Step
from zoft.weights.blocks import Block

Factors = tuple[torch.Tensor, torch.Tensor]


class LowRankDirections(Directions):
    """``u = L R^T`` on every block that is a matrix of more than ``rank`` rows and columns, plain noise elsewhere.

    A block of more dimensions is the matrix of its first dimension by the others. Where the rank is not below both
    sides nothing would be saved, and u is plain noise: full rank is MeZO bit for bit.
    """

    what: ClassVar[str] = "this method"
    squares: ClassVar[bool] = False  # whether the thin blocks of adapters are seen as squarer matrices

    rank: int = Field(2, ge=1, description="rank of the directions, r")

    def check(self, host: Host) -> None:
        """Raise `ModelError` where no block is a matrix."""
        if not any(len(block.shape) > 1 for block in host.blocks):
            raise ModelError(
                f"{self.what} needs matrices, and all {len(host.blocks)} trainable blocks are vectors (such as "
                f"{host.blocks[0].name!r}); try mezo"
            )

    def low(self, block: Block) -> bool:
        """Whether directions are of low rank on ``block``."""
        return len(block.shape) > 1 and self.rank < min(self.sides(block))

    def sides(self, block: Block) -> tuple[int, int]:
        """Return rows and columns of ``block`` seen as the matrix that has the factors."""
        return squarest(block.size) if self.squares and block.in_adapter else sides(block)

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the direction of one probe; a tuner's scales multiply it."""
        scales = host.named_scales(step)

        def factors(block: Block) -> Factors | None:
            if not self.low(block):
                return None
            left, right = self.factors(host, step, probe, block)
            scale = scales.get(block.name, 1.0)
            return (left if scale == 1 else left * scale), right

        return LowRank(host.isotropic(step, probe), factors)

    def factors(self, host: Host, step: Step, probe: int, block: Block) -> Factors:
        """Return L ``(m, r)`` and R ``(n, r)`` of ``block``."""
        raise NotImplementedError

    def drawn(self, host: Host, seed: int, key: str, block: Block, shape: tuple[int, ...]) -> torch.Tensor:
        """Return normal numbers, a function of the seed, ``key`` and the block."""
        key = f"{key}/{block.name}"
        return normal_numbers(seed, key, shape, block.parameter.device, host.table_dtype)


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
