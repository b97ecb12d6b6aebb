"""ZO-DAP: directionally aligned perturbations (arXiv 2510.19975, proposition 4.1)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from zoft.noise.direction import Direction
from zoft.noise.table import chunk_length
from zoft.optim.core.derived import combination
from zoft.optim.core.parts import Directions
from zoft.optim.core.record import StepRecord

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer
    from zoft.optim.core.oracle import Look


class Aligned(Directions):
    """Of 2q probes the first q estimate the gradient by a; along a the others have exactly length one.

    ``a = sum_i slope_i z_i``, ``v = z + kappa a`` with ``kappa = (+-|a| - z . a) / |a|^2``, so that ``v . a = +-|a|``:
    one fair coin, and sums over all blocks. The step takes the mean of all 2q estimates. Nothing of the size of the
    weights is stored: a is drawn again from the seeds. 4q forward passes, to be compared with MeZO at 2q probes.

    >>> Aligned().keep_first
    True
    """

    keep_first: bool = Field(True, description="average both halves; the published LLM code throws the first away")
    one_sided: bool = Field(False, description="one-sided differences, as the published LLM code; 2q + 1 forwards")

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """Return ``record`` with the losses, the first slopes and kappa."""
        probes = optimizer.param_groups[0]["probes"]
        record = replace(record, sides=1 if self.one_sided else 2)
        centre = look() if self.one_sided else None
        first = tuple(self._pair(look, record, optimizer.isotropic(record, p), centre) for p in range(probes))
        slopes = replace(record, losses=first).slopes
        record = replace(record, extra={**record.extra, "slopes": slopes})
        kappas = tuple(self._kappa(optimizer, record, probes + p) for p in range(probes))
        record = replace(record, extra={**record.extra, "kappa": kappas})
        second = tuple(self._pair(look, record, self._aligned(optimizer, record, p), centre) for p in range(probes))
        return replace(record, losses=first + second if self.keep_first else second)

    def _pair(self, look: Look, record: StepRecord, u: Direction, centre: float | None) -> tuple[float, float]:
        pos = look(u, record.eps)
        return pos, look(u, -record.eps) if centre is None else centre

    def forwards(self, probes: int) -> int:
        """Return those of 2q probes."""
        return 2 * probes + 1 if self.one_sided else 4 * probes

    def direction(self, optimizer: ZOOptimizer, record: StepRecord, probe: int) -> Direction:
        """Return the direction of one probe: plain noise first, then the aligned ones."""
        count = len(record.numbers("kappa")) if self.keep_first else 0
        if probe < count:
            return optimizer.isotropic(record, probe)
        return self._aligned(optimizer, record, probe - count)

    def _aligned(self, optimizer: ZOOptimizer, record: StepRecord, number: int) -> Direction:
        kappa = record.numbers("kappa")[number]
        z = optimizer.isotropic(record, number + len(record.numbers("kappa")))
        return combination([(1.0, z), (kappa, self._a(optimizer, record))]) if kappa else z

    def _a(self, optimizer: ZOOptimizer, record: StepRecord) -> Direction:
        return combination([(c, optimizer.isotropic(record, p)) for p, c in enumerate(record.numbers("slopes"))])

    def _kappa(self, optimizer: ZOOptimizer, record: StepRecord, probe: int) -> float:
        """One read-only sweep over all blocks; sums in float64. 0 where a slope is not finite, or all are 0."""
        if not all(map(math.isfinite, record.numbers("slopes"))):
            return 0.0
        z, along, product, square = optimizer.isotropic(record, probe), self._a(optimizer, record), 0.0, 0.0
        for block in optimizer.blocks:
            for lo in range(0, block.size, chunk_length(block)):
                piece = slice(lo, min(block.size, lo + chunk_length(block)))
                a = along.u(block, piece).double()
                product += float(a @ z.u(block, piece).double())
                square += float(a @ a)
        coin = hashlib.sha256(f"{record.seed}/{record.step}/{probe}/coin".encode()).digest()[0] % 2
        return ((2 * coin - 1) * math.sqrt(square) - product) / square if square else 0.0
