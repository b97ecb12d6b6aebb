"""DiZO whose rescaling is found by backpropagation (arXiv 2502.03304)."""

from typing import Any

import numpy as np
from pydantic import Field

from zoft.optim.core.anchored import ratio_gradient
from zoft.optim.core.method import Method, Published
from zoft.optim.core.oracle import Oracle
from zoft.optim.methods.dizo import DiZO, Search


class FirstOrderDiZO(DiZO):
    """DiZO whose gamma is found by Adam on its gradient, by backpropagation to the projected blocks alone.

    ``dL / d gamma = <grad L, D> / |D|`` at ``theta_0 + gamma / |D| D``. An inner step is a forward and a backward pass,
    three forwards; gradients are those of the projected blocks, and no optimizer state but two numbers a block.

    >>> FirstOrderDiZO().inner
    10
    """

    rate: float = Field(0.01, gt=0, description="learning rate of gamma, Adam's")

    def forwards(self, steps: int) -> float:
        """Return three for every inner step: a forward and a backward pass."""
        return steps // self.cycle * 3 * self.inner

    def better(self, oracle: Oracle, search: Search, generator: np.random.Generator) -> Any:
        """Return gamma after one inner step of Adam (0.9, 0.999)."""
        loss, gradient = ratio_gradient(search.anchored, search.ratios(search.gamma), oracle.closure)
        oracle.count(3)
        search.losses.append(loss)
        g = search.ratios(gradient)  # from ratio to gamma
        search.m, search.v = 0.9 * search.m + 0.1 * g, 0.999 * search.v + 0.001 * g * g
        count = len(search.losses)
        root = np.sqrt(search.v / (1 - 0.999**count)) + 1e-8
        return search.gamma - self.rate_at(search) * (search.m / (1 - 0.9**count)) / root


METHOD = Method(
    "dizo-fo",
    "DiZO whose rescaling is found by backpropagation",
    "arXiv 2502.03304",
    parts=(FirstOrderDiZO,),
    published={"full": Published(grid=(5e-7, 1e-6))},
)
