"""ZO-DAP: directionally aligned perturbations (arXiv 2510.19975, proposition 4.1)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from pydantic import Field

from zoft.noise.direction import Direction
from zoft.noise.table import chunk_length
from zoft.optim.core.derived import combination
from zoft.optim.core.method import Method
from zoft.optim.core.oracle import Oracle
from zoft.optim.core.parts import Directions, Host
from zoft.optim.core.record import Measured, Step, StepRecord, StepStart


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

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return the losses, the first slopes and kappa."""
        probes, sides = range(host.probes), 1 if self.one_sided else 2
        centre = oracle() if self.one_sided else None

        def pair(u: Direction) -> tuple[float, float]:
            pos = oracle(u, start.eps)
            return pos, oracle(u, -start.eps) if centre is None else centre

        first = tuple(pair(host.isotropic(start, p)) for p in probes)
        slopes = start.record(Measured(first, sides)).slopes
        kappas = tuple(self._kappa(host, start, host.probes + p, slopes) for p in probes)
        second = tuple(pair(self._aligned(host, start, p, slopes, kappas)) for p in probes)
        losses = first + second if self.keep_first else second
        return Measured(losses, sides, {"slopes": slopes, "kappa": kappas})

    def forwards(self, probes: int) -> int:
        """Return those of 2q probes."""
        return 2 * probes + 1 if self.one_sided else 4 * probes

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the direction of one probe of a measured step: plain noise first, then the aligned ones."""
        assert isinstance(step, StepRecord)  # where the aligned ones point is measured
        slopes, kappas = step.numbers("slopes"), step.numbers("kappa")
        count = len(kappas) if self.keep_first else 0
        if probe < count:
            return host.isotropic(step, probe)
        return self._aligned(host, step, probe - count, slopes, kappas)

    def _aligned(
        self, host: Host, step: Step, number: int, slopes: Sequence[float], kappas: Sequence[float]
    ) -> Direction:
        z, kappa = host.isotropic(step, number + len(kappas)), kappas[number]
        return combination([(1.0, z), (kappa, self._a(host, step, slopes))]) if kappa else z

    def _a(self, host: Host, step: Step, slopes: Sequence[float]) -> Direction:
        return combination([(slope, host.isotropic(step, p)) for p, slope in enumerate(slopes)])

    def _kappa(self, host: Host, step: Step, probe: int, slopes: Sequence[float]) -> float:
        """One read-only sweep over all blocks; sums in float64. 0 where a slope is not finite, or all are 0."""
        if not all(map(math.isfinite, slopes)):
            return 0.0
        z, along, product, square = host.isotropic(step, probe), self._a(host, step, slopes), 0.0, 0.0
        for block in host.probed:
            for lo in range(0, block.size, chunk_length(block)):
                piece = slice(lo, min(block.size, lo + chunk_length(block)))
                a = along.u(block, piece).double()
                product += float(a @ z.u(block, piece).double())
                square += float(a @ a)
        coin = hashlib.sha256(f"{step.seed}/{step.step}/{probe}/coin".encode()).digest()[0] % 2
        return ((2 * coin - 1) * math.sqrt(square) - product) / square if square else 0.0


METHOD = Method(
    "zo-dap",
    "probes of fixed length along an estimate of the gradient",
    "arXiv 2510.19975",
    parts=(Aligned,),
)
