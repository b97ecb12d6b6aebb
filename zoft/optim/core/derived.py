"""Directions made of others: functions of isotropic noise, of the weights and of the state of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from zoft.noise.direction import Direction, long_rows
from zoft.noise.table import ROW, Where, chunk_length
from zoft.weights.blocks import Block
from zoft.weights.dtypes import work_dtype
from zoft.weights.perturbed import WeightSource


class Derived:
    """A direction given by ``u(block, where)``, in float32 (float64 for float64 weights).

    ``where`` is a flat range within one chunk of the block, or rows of a matrix. Perturbed weights are computed in
    that dtype and rounded once, so that what is probed is what is updated, up to that rounding.
    """

    def __init__(
        self, u: Callable[[Block, Where], torch.Tensor], idle: Callable[[Block], bool] = lambda block: False
    ) -> None:
        self._u, self._idle = u, idle

    def u(self, block: Block, where: Where) -> torch.Tensor:
        """Return ``u`` at ``where``."""
        return self._u(block, where)

    def idle(self, block: Block) -> bool:
        """Whether ``u`` is zero on the whole of ``block``."""
        return self._idle(block)

    def windows(self, block: Block, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, float]]:
        """Yield ``(lo, hi, u, 1.0)`` that cover the flat range ``start:stop``."""
        length = chunk_length(block)
        for chunk in range(start // length, -(-stop // length)):
            lo, hi = max(start, chunk * length), min(stop, (chunk + 1) * length)
            yield lo, hi, self.u(block, slice(lo, hi)), 1.0

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write ``theta + eps * u`` for the flat range ``start:stop`` into the flat ``out`` and return it."""
        theta = block.parameter.detach().view(-1)
        for lo, hi, u, _ in self.windows(block, start, stop):
            out[lo - start : hi - start] = torch.add(theta[lo:hi].to(u.dtype), u, alpha=eps)
        return out

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``theta + eps * u`` at ``rows`` (any shape, integer) of a matrix: ``(*rows.shape, width)``."""
        theta, width, flat = block.parameter.detach(), block.shape[-1], rows.flatten()
        if width > ROW:  # a row spans several chunks: take it as a range
            return long_rows(self, block, rows, eps)
        u = self.u(block, flat)
        return torch.add(theta[flat].to(u.dtype), u, alpha=eps).to(theta.dtype).view(*rows.shape, width)


def combination(terms: Sequence[tuple[float, Direction]]) -> Derived:
    """Return the direction ``sum of coefficient * u`` of ``terms``."""

    def u(block: Block, where: Where) -> torch.Tensor:
        parts = [coefficient * direction.u(block, where) for coefficient, direction in terms]
        return sum(parts[1:], start=parts[0])

    return Derived(u, lambda block: all(direction.idle(block) for _, direction in terms))


class LowRank:
    """``u = L R^T`` on the matrices that ``factors`` knows; elsewhere what ``base`` gives.

    ``factors(block)`` returns ``L`` ``(m, r)`` and ``R`` ``(n, r)`` of a block seen as a matrix, mostly of
    ``m = shape[0]`` rows, or None. They are computed once for every direction; of ``u`` only the piece that is read is
    in memory.
    """

    def __init__(self, base: Direction, factors: Callable[[Block], tuple[torch.Tensor, torch.Tensor] | None]) -> None:
        self._base, self._factors = base, factors
        self._made: dict[str, tuple[torch.Tensor, torch.Tensor] | None] = {}
        self._derived = Derived(self.u, base.idle)

    def factors(self, block: Block) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return ``L`` and ``R`` of ``block``, None where it has none."""
        if block.name not in self._made:
            made, dtype = self._factors(block), work_dtype(block.parameter.dtype)
            self._made[block.name] = None if made is None else (made[0].to(dtype), made[1].to(dtype))
        return self._made[block.name]

    def _source(self, block: Block) -> Direction:
        return self._base if self.factors(block) is None else self._derived

    def u(self, block: Block, where: Where) -> torch.Tensor:
        """Return ``u`` at ``where``."""
        factors = self.factors(block)
        if factors is None:
            return self._base.u(block, where)
        left, right = factors
        if not isinstance(where, slice):
            if len(left) != block.shape[0]:  # of another matrix with the same numbers
                return (left @ right.T).view(block.shape)[where]
            return left[where] @ right.T
        # The whole chunk is computed whatever part of it is asked for: the bits of a product depend on its shape.
        length, width = chunk_length(block), len(right)
        start = where.start // length * length
        stop = min(block.size, start + length)
        first, last = start // width, -(-stop // width)
        product = (left[first:last] @ right.T).view(-1)
        return product[where.start - first * width : where.stop - first * width]

    def idle(self, block: Block) -> bool:
        """Whether ``u`` is zero on the whole of ``block``."""
        return self._base.idle(block)

    def windows(self, block: Block, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, float]]:
        """Yield windows that cover the flat range ``start:stop``."""
        return self._source(block).windows(block, start, stop)

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write ``theta + eps * u`` for the flat range ``start:stop`` into the flat ``out`` and return it."""
        return self._source(block).perturb(block, start, stop, eps, out)

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return ``theta + eps * u`` at ``rows`` of a matrix."""
        return self._source(block).perturb_rows(block, rows, eps)


class Elsewhere:
    """Perturbed weights around other weights than the stored ones, given by block name."""

    def __init__(self, direction: WeightSource, weights: Mapping[str, torch.Tensor]) -> None:
        self._direction = direction
        self._twins = {
            name: Block(name, torch.nn.Parameter(tensor, requires_grad=False)) for name, tensor in weights.items()
        }

    def idle(self, block: Block) -> bool:
        """Return False: every block is read elsewhere."""
        return False

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write the flat range ``start:stop`` of the other weights plus ``eps * u`` into ``out`` and return it."""
        return self._direction.perturb(self._twins[block.name], start, stop, eps, out)

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return rows of the other weights plus ``eps * u``."""
        return self._direction.perturb_rows(self._twins[block.name], rows, eps)
