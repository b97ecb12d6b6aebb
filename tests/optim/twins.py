"""What the twins of the methods have in common: blocks, an objective, the noise by its specification, 50 steps.

A twin is a method written out again from its paper in float64 torch, on whole tensors, without the engine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.noise.test_noise import reference_z
from zoft.optim import FullObjective, ZOOptimizer, get_method

Tensors = list[torch.Tensor]
LR, EPS, SEED = 1e-4, 1e-3, 9
NAMES = ("layers.0.q_proj.weight", "layers.0.norm.bias", "layers.1.v_proj.weight", "conv.weight")
SHAPES = ((24, 20), (7,), (16, 12), (3, 5, 4))


def start(dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def objective(tensors: Sequence[torch.Tensor], batch: int = 0) -> torch.Tensor:
    """Smooth, neither quadratic nor separable by block; each ``batch`` has another minimum."""
    total = sum(((tensor - 0.3 - 0.1 * batch) ** 2).sum() + torch.sin(tensor).sum() for tensor in tensors)
    return total + 0.1 * (tensors[0][0, 0] * tensors[2][0, 0]) + 0.05 * tensors[1].sum() * tensors[3].sum()


class Twin:
    """A method on ``theta``, a list of float64 tensors; ``step(t)`` takes a step."""

    def __init__(self, *, lr: float = LR, eps: float = EPS, probes: int = 1, **options: Any) -> None:
        self.theta, self.lr, self.eps, self.probes = start(), lr, eps, probes
        for name, value in options.items():
            setattr(self, name, value)
        self.begin()

    def begin(self) -> None:
        """Make the state."""

    def step(self, t: int) -> None:
        raise NotImplementedError

    def loss(self, theta: Tensors, t: int) -> float:
        return float(objective(theta, t % 2))

    def whole(self, theta: Tensors) -> float:
        return sum(float(objective(theta, batch)) for batch in (0, 1)) / 2

    def z(self, t: int, probe: int = 0) -> Tensors:
        pairs = zip(NAMES, SHAPES, strict=True)
        return [torch.from_numpy(reference_z(SEED, t, probe, name, shape)) for name, shape in pairs]

    def moved(self, u: Tensors, by: float) -> Tensors:
        return [tensor + by * direction for tensor, direction in zip(self.theta, u, strict=True)]

    def slope(self, u: Tensors, t: int) -> float:
        return (self.loss(self.moved(u, self.eps), t) - self.loss(self.moved(u, -self.eps), t)) / (2 * self.eps)

    def gradient(self, t: int) -> Tensors:
        """1/q sum_p slope_p z_p."""
        total = [torch.zeros_like(tensor) for tensor in self.theta]
        for probe in range(self.probes):
            z = self.z(t, probe)
            slope = self.slope(z, t)
            total = [a + slope * b / self.probes for a, b in zip(total, z, strict=True)]
        return total


def follow(
    method: str,
    twin: Twin,
    *,
    options: dict[str, Any] | None = None,
    steps: int = 50,
    check: Callable[[ZOOptimizer, int], None] = lambda optimizer, step: None,
    **settings: Any,
) -> ZOOptimizer:
    """Take ``steps`` steps of ``method`` and of its ``twin``, and hold the weights against each other."""
    parameters = [torch.nn.Parameter(tensor) for tensor in start()]
    named = list(zip(NAMES, parameters, strict=True))
    whole = FullObjective(lambda: sum(float(objective(parameters, batch)) for batch in (0, 1)) / 2, forwards=2)
    given = {"lr": twin.lr, "eps": twin.eps, "probes": twin.probes, "seed": SEED, "full": whole} | settings
    optimizer = get_method(method).make(named, options=options, **given)
    for t in range(steps):
        optimizer.step(lambda t=t: objective(parameters, t % 2))
        twin.step(t)
        check(optimizer, t)
    for name, parameter, expected in zip(NAMES, parameters, twin.theta, strict=True):
        torch.testing.assert_close(
            parameter.detach(), expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not torch.equal(parameter.detach(), start()[NAMES.index(name)]) or method == "lezo"
    return optimizer
