"""LOZO, LOZO-M, SubZero, TeZO: twins, the rank and the norm of what is probed, full rank is MeZO, what they hold."""

import math

import numpy as np
import pytest
import torch

from tests.noise.test_noise import reference_table, reference_z
from tests.optim.twins import EPS, LR, NAMES, SEED, SHAPES, Twin, follow, objective, start
from zoft.errors import ConfigError, ModelError
from zoft.noise.table import TABLE_SIZE, places
from zoft.optim import LOZO, LOZOMomentum, MeZO, StepRecord, SubZero, TeZO, ZOFineTuner, ZOOptimizer, get_method
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import Block

IDS = torch.arange(3, 27).view(2, 12)


def numbers(key: str, *shape: int) -> torch.Tensor:
    """Normal numbers of up to one chunk, by their specification: one place in the table, one sign."""
    (offset,), (sign,) = places(f"{SEED}/{key}", 1, TABLE_SIZE)
    drawn = sign * reference_table(SEED)[offset : offset + math.prod(shape)]
    return torch.from_numpy(drawn.copy()).view(shape)


class LowRankTwin(Twin):
    rank, refresh = 3, 7

    def matrix(self, i: int) -> tuple[int, int] | None:
        shape = SHAPES[i]
        if len(shape) < 2 or self.rank >= min(shape[0], math.prod(shape[1:])):
            return None
        return shape[0], math.prod(shape[1:])

    def product(self, i: int, t: int, m: int, n: int) -> torch.Tensor:
        raise NotImplementedError

    def u(self, t: int) -> list[torch.Tensor]:
        u = []
        for i, z in enumerate(self.z(t)):
            matrix = self.matrix(i)
            u.append(z if matrix is None else self.product(i, t, *matrix).view(SHAPES[i]))
        return u

    def shares(self) -> list[float]:
        return [1.0 if self.matrix(i) is None else 1 / self.rank for i in range(len(SHAPES))]

    def step(self, t: int) -> None:
        u = self.u(t)
        p = self.slope(u, t)
        self.theta = [x - self.lr * p * w * d for x, d, w in zip(self.theta, u, self.shares(), strict=True)]


class LOZOTwin(LowRankTwin):
    divide = True

    def factors(self, i: int, t: int, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        v = numbers(f"{t // self.refresh}/right/{NAMES[i]}", n, self.rank)
        return numbers(f"{t}/0/left/{NAMES[i]}", m, self.rank), v

    def product(self, i: int, t: int, m: int, n: int) -> torch.Tensor:
        left, right = self.factors(i, t, m, n)
        return left @ right.T

    def shares(self) -> list[float]:
        return super().shares() if self.divide else [1.0] * len(SHAPES)


@pytest.mark.parametrize("divide", [True, False])
def test_lozo_follows_the_formula(divide: bool) -> None:
    options = {"rank": 3, "refresh": 7, "divide": divide}
    follow("lozo", LOZOTwin(**options), options=options)


class LOZOMTwin(LOZOTwin):
    beta = 0.9

    def begin(self) -> None:
        self.n: dict[int, torch.Tensor] = {}
        self.m: dict[int, torch.Tensor] = {}

    def step(self, t: int) -> None:
        u = self.u(t)
        p = self.slope(u, t)
        for i, (name, direction) in enumerate(zip(NAMES, u, strict=True)):
            matrix = self.matrix(i)
            if matrix is None:
                self.m[i] = self.beta * self.m.get(i, torch.zeros_like(direction)) + (1 - self.beta) * p * direction
                self.theta[i] = self.theta[i] - self.lr * self.m[i]
                continue
            left, right = self.factors(i, t, *matrix)
            n = self.n.get(i, torch.zeros_like(left))
            if t % self.refresh == 0 and t:
                old = numbers(f"{t // self.refresh - 1}/right/{name}", *right.shape)
                n = n @ (old.T @ right) / len(right)
            self.n[i] = self.beta * n + (1 - self.beta) * p * left / self.rank
            self.theta[i] = self.theta[i] - self.lr * (self.n[i] @ right.T).view(SHAPES[i])


def test_lozo_m_follows_the_formula() -> None:
    options = {"rank": 3, "refresh": 7, "beta": 0.9}
    optimizer = follow("lozo-m", LOZOMTwin(rank=3, refresh=7), options=options)
    held = {key: tuple(value.shape) for state in optimizer.state.values() for key, value in state.items()}
    assert held["left momentum"] in ((24, 3), (16, 3))


class SubZeroTwin(LowRankTwin):
    def product(self, i: int, t: int, m: int, n: int) -> torch.Tensor:
        u, v = (
            torch.from_numpy(
                np.linalg.qr(numbers(f"{t // self.refresh}/{side}/{NAMES[i]}", size, self.rank).numpy())[0]
            )
            for side, size in (("left", m), ("right", n))
        )
        z = numbers(f"{t}/0/core/{NAMES[i]}", self.rank, self.rank)
        # The bases are kept in float32, as what is multiplied with the weights' noise everywhere.
        return math.sqrt(m * n) / self.rank * (u.float().double() @ z @ v.float().double().T)

    def shares(self) -> list[float]:
        return [1.0] * len(SHAPES)


def test_subzero_follows_the_formula() -> None:
    follow("subzero", SubZeroTwin(rank=3, refresh=7), options={"rank": 3, "refresh": 7})


class TeZOTwin(LowRankTwin):
    def product(self, i: int, t: int, m: int, n: int) -> torch.Tensor:
        u, v = (numbers(f"fixed/{side}/{NAMES[i]}", size, self.rank) for side, size in (("left", m), ("right", n)))
        return u @ torch.diag(numbers(f"{t}/0/tau/{NAMES[i]}", self.rank)) @ v.T


def test_tezo_follows_the_formula() -> None:
    follow("tezo", TeZOTwin(rank=3), options={"rank": 3})


def direction_of(directions, block: Block, step: int = 0):
    optimizer = ZOOptimizer([(block.name, block.parameter)], lr=1, eps=1, directions=directions)
    return directions.direction(optimizer, StepRecord(step, 0, (1.0,), 1.0, ()), 0)


@pytest.mark.parametrize("directions", [LOZO(rank=4), SubZero(rank=4), TeZO(rank=4)])
def test_what_is_probed_has_the_rank_and_is_unbiased_in_norm(directions) -> None:
    block = Block("w", torch.nn.Parameter(torch.zeros(300, 400)))
    u = direction_of(directions, block).u(block, slice(0, 163 * 400))
    whole = torch.cat([piece for _, _, piece, _ in direction_of(directions, block).windows(block, 0, block.size)])
    assert torch.equal(whole[: 163 * 400], u)
    matrix = whole.view(300, 400)
    assert int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-6)) == 4
    norms = [
        torch.cat([p for _, _, p, _ in direction_of(directions, block, step).windows(block, 0, block.size)])
        .square()
        .sum()
        for step in range(40)
    ]
    mean = torch.stack(norms).mean() * directions.weight(block) / block.size
    assert float(mean) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("method", ["lozo", "subzero", "tezo"])
def test_probing_and_updating_see_the_same_direction_also_where_factors_change(method: str) -> None:
    """For a linear objective c . theta the update is -lr (c . u) w u exactly: of what was probed, in every step."""
    shape, eps = (40, 30), 0.5
    c = torch.from_numpy(reference_z(5, 0, 0, "c", shape))
    options = {"rank": 2} | ({"refresh": 2} if method != "tezo" else {})
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = get_method(method).make([("p", p)], lr=1.0, eps=eps, options=options)
    for _ in range(5):
        before, seen = p.detach().clone(), []

        def closure(seen: list = seen) -> torch.Tensor:
            seen.append((p * 1.0).detach())
            return (c * p).sum()

        optimizer.verify(lambda: 0.0)
        optimizer.step(closure)
        u = (seen[0] - before) / eps
        weight = optimizer.directions.weight(optimizer.blocks[0])
        torch.testing.assert_close(p.detach(), before - (c * u).sum() * weight * u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("directions", "rule"),
    [(LOZO(rank=2000), None), (SubZero(rank=2000), None), (TeZO(rank=2000), None)],
)
def test_full_rank_is_mezo_bit_for_bit(directions, rule, tiny_model) -> None:
    plain, other = (tiny_model("qwen2", torch.bfloat16) for _ in range(2))
    mezo = MeZO(plain, lr=1e-2, eps=EPS)
    optimizer = ZOOptimizer(other, lr=1e-2, eps=EPS, directions=directions, rule=rule)
    for _ in range(3):
        mezo.step(lambda: plain(IDS, labels=IDS).loss)
        optimizer.step(lambda: other(IDS, labels=IDS).loss)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_lozo_m_without_momentum_is_lozo_bit_for_bit() -> None:
    ends = []
    for rule in (None, LOZOMomentum(beta=0)):
        parameters = [torch.nn.Parameter(t) for t in start(torch.float32)]
        optimizer = ZOOptimizer(parameters, lr=LR, eps=EPS, directions=LOZO(rank=2), rule=rule)
        for _ in range(5):
            optimizer.step(lambda parameters=parameters: objective(parameters))
        ends.append(parameters)
        assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_tuner_scales_directions_of_low_rank(tiny_model) -> None:
    """A scale of 2 on every block is an eps of 2 and a rate of 4."""
    one, two = (tiny_model("llama") for _ in range(2))
    net = PertNN([name for name, _ in one.named_parameters()])
    tuned = ZOFineTuner(one, net, lr=1e-3, eps=1e-3, directions=LOZO(rank=2))
    plain = ZOOptimizer(two, lr=4e-3, eps=2e-3, directions=LOZO(rank=2))
    record = plain.measure(lambda: two(IDS, labels=IDS).loss)
    plain.apply(record)
    scaled = StepRecord(0, 0, (1e-3,), 1e-3, record.losses, (2.0,) * len(tuned.blocks))
    tuned.apply(scaled)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_mistakes_are_told() -> None:
    vectors = [(f"ia3_{i}", torch.nn.Parameter(torch.ones(8))) for i in range(3)]
    for method in ("lozo", "lozo-m", "subzero", "tezo"):
        with pytest.raises(
            ModelError, match=r"needs matrices, and all 3 trainable blocks are vectors \(such as 'ia3_0'\)"
        ):
            get_method(method).make(vectors)
    matrix = torch.nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ConfigError, match="give LOZO as directions, too"):
        ZOOptimizer([matrix], lr=1, eps=1, rule=LOZOMomentum()).step(lambda: matrix.sum())


@pytest.mark.parametrize("directions", [SubZero(rank=4), TeZO(rank=4)])
def test_thin_blocks_of_adapters_are_seen_as_squarer_matrices(directions) -> None:
    """Directions have the rank as matrices of 9 x 14, though the block has 3 rows; other blocks have plain noise."""
    names = ("layers.0.q_proj.lora_A.default.weight", "layers.0.other.weight")
    parameters = [(name, torch.nn.Parameter(torch.zeros(3, 42))) for name in names]
    optimizer = ZOOptimizer(parameters, lr=1.0, eps=1e-3, directions=directions)
    record = optimizer.measure(lambda: sum(p.sum() + p.square().sum() for _, p in parameters))
    direction = directions.direction(optimizer, record, 0)
    thin, other = optimizer.blocks
    assert directions.sides(thin) == (9, 14) and directions.sides(other) == (3, 42)
    u = torch.zeros(126)
    direction.perturb(thin, 0, 126, 1.0, u)
    assert torch.linalg.matrix_rank(u.view(9, 14)) == 4
    whole, rows = direction.u(thin, slice(0, 126)), direction.u(thin, torch.tensor([2, 0]))
    torch.testing.assert_close(rows, whole.view(3, 42)[[2, 0]])
    torch.testing.assert_close(u, whole)
    noise = torch.zeros(126)
    direction.perturb(other, 0, 126, 1.0, noise)
    assert torch.linalg.matrix_rank(noise.view(9, 14)) == 9
