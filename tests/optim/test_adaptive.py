"""FZOO, HiZOO, ZO-AdaMU, MeZO-SVRG, ZO-DAP, ZO-Muon, ZO-LDSD: twins, what their papers claim, where they are MeZO."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.optim.test_lowrank import LowRankTwin, numbers
from tests.optim.twins import EPS, NAMES, SEED, SHAPES, Tensors, Twin, follow, objective, start
from zoft.errors import ConfigError
from zoft.optim import (
    SVRG,
    Aligned,
    Curvature,
    FullObjective,
    LearnedMean,
    MeZO,
    MomentumNoise,
    Orthogonal,
    Signs,
    SpreadSteps,
    Subspace,
    UncertainSteps,
    ZOOptimizer,
    get_method,
)
from zoft.optim.methods.zo_muon import msign

IDS = torch.arange(3, 27).view(2, 12)


def dot(a: Tensors, b: Tensors) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def plus(a: Tensors, b: Tensors, by: float = 1.0) -> Tensors:
    return [x + by * y for x, y in zip(a, b, strict=True)]


def times(a: Tensors, by: float) -> Tensors:
    return [x * by for x in a]


# -- FZOO ---------------------------------------------------------------------------------------------------------


class FZOOTwin(Twin):
    def step(self, t: int) -> None:
        centre = self.loss(self.theta, t)
        signs = [[torch.where(z < 0, -1.0, 1.0).double() for z in self.z(t, p)] for p in range(self.probes)]
        losses = [self.loss(self.moved(r, self.eps), t) for r in signs]
        spread = float(np.std(losses))
        for loss, r in zip(losses, signs, strict=True):
            self.theta = self.moved(r, -self.lr / (self.probes * spread) * (loss - centre))


def test_fzoo_follows_the_formula() -> None:
    follow("fzoo", FZOOTwin(probes=8))


def test_fzoo_counts_one_more_than_its_probes_and_eps_cancels() -> None:
    """On a linear objective the step does not depend on eps, nor on the size of the objective."""
    ends = []
    for eps, size in ((1e-2, 1.0), (1e-4, 7.0)):
        p = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
        optimizer = get_method("fzoo").make([("p", p)], lr=1e-2, eps=eps)
        record = optimizer.measure(lambda p=p, size=size: size * (p * torch.arange(50)).sum())
        optimizer.apply(record)
        assert record.forwards == 9 and record.sides == 1 and len(record.losses) == 8
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
    with pytest.raises(ConfigError, match="needs 2 probes at least"):
        ZOOptimizer([p], lr=1, eps=1, directions=Signs(), rule=SpreadSteps()).step(lambda: p.sum())


# -- HiZOO --------------------------------------------------------------------------------------------------------


class HiZOOTwin(Twin):
    alpha, centred = 1e-6, True

    def begin(self) -> None:
        self.h = [torch.ones_like(x) for x in self.theta]

    def step(self, t: int) -> None:
        z = self.z(t)
        u = [a / h.sqrt() for a, h in zip(z, self.h, strict=True)]
        centre = self.loss(self.theta, t)
        pos, neg = (self.loss(self.moved(u, side * self.eps), t) for side in (1, -1))
        bend = abs(pos + neg - 2 * centre) / (2 * self.eps**2)
        self.theta = self.moved(u, -self.lr * (pos - neg) / (2 * self.eps))
        curvature = [bend * (h * a**2 - h * self.centred).abs() for h, a in zip(self.h, z, strict=True)]
        self.h = [
            ((1 - self.alpha) * h + self.alpha * c).clamp(1e-4, 1e4) for h, c in zip(self.h, curvature, strict=True)
        ]


@pytest.mark.parametrize("centred", [True, False])
def test_hizoo_follows_the_formula(centred: bool) -> None:
    twin = HiZOOTwin(centred=centred, eps=1e-2, alpha=1e-5)
    optimizer = follow("hizoo", twin, options={"alpha": 1e-5, "centred": centred})
    for block, h in zip(optimizer.blocks, twin.h, strict=True):
        torch.testing.assert_close(optimizer.state[block.parameter]["curvature"], h, rtol=1e-6, atol=1e-6)
        assert float((h - 1).abs().max()) > 1e-2


def test_hizoo_moves_h_in_half_precision_and_counts_three_forwards(tiny_model) -> None:
    model = tiny_model("llama", torch.bfloat16)
    optimizer = get_method("hizoo").make(model, lr=1e-3, options={"alpha": 1e-8})
    record = optimizer.measure(lambda: model(IDS, labels=IDS).loss)
    optimizer.apply(replace(record, extra={"centre": record.losses[0][0] - 0.5}))
    assert record.forwards == 3
    h = optimizer.state[model.model.embed_tokens.weight]["curvature"]
    assert h.dtype == torch.float32 and (h != 1).float().mean() > 0.9


# -- ZO-AdaMU -----------------------------------------------------------------------------------------------------


class AdaMUTwin(Twin):
    warmup, total_steps = 5, 50

    def begin(self) -> None:
        self.h = [torch.zeros_like(x) for x in self.theta]

    def shares(self, t: int) -> list[float]:
        end = 40  # 0.8 of 50
        gone = min(t, end) - self.warmup
        shares = []
        for phi in (1.0, 0.1, 1.5):
            length = self.total_steps - phi * (self.total_steps - end) * gone / (end - self.warmup)
            shares.append(0.5 * (1 + math.cos(math.pi * min(1, gone / length))))
        return shares

    def step(self, t: int) -> None:
        z = self.z(t)
        if t < self.warmup:
            m, v = z, [torch.ones_like(x) for x in z]
        else:
            a, b1, b2 = self.shares(t)
            fresh = times(z, math.sqrt(a))
            around = plus(self.h, self.z(t, 1), math.sqrt(1 - a))
            m = plus(times(fresh, b1), around, 1 - b1)
            v = [b2 * x**2 + (1 - b2) * y**2 + 1e-8 for x, y in zip(fresh, around, strict=True)]
        p = self.slope(m, t)
        self.theta = [x - self.lr * p * d / c.sqrt() for x, d, c in zip(self.theta, m, v, strict=True)]
        self.h = times(m, math.copysign(1, p))


def test_adamu_follows_the_formula() -> None:
    follow("zo-adamu", AdaMUTwin(), options={"warmup": 5, "total_steps": 50})


def test_adamu_probes_what_it_updates() -> None:
    """For a linear objective c . theta and v = 1 the update would be -lr (c . m) m: with m as it was probed."""
    p = torch.nn.Parameter(torch.zeros(40, 30, dtype=torch.float64))
    c = torch.linspace(-1, 1, 1200, dtype=torch.float64).view(40, 30)
    noise = MomentumNoise(warmup=2, total_steps=10)
    optimizer = ZOOptimizer([("p", p)], lr=1e-3, eps=0.5, directions=noise, rule=UncertainSteps())
    optimizer.verify(lambda: 0.0)
    for step in range(6):
        before, seen = p.detach().clone(), []

        def closure(seen: list = seen) -> torch.Tensor:
            seen.append((p * 1.0).detach())
            return (c * p).sum()

        record = optimizer.measure(closure)
        m = (seen[0] - before) / 0.5
        along = noise.direction(optimizer, record, 0).u(optimizer.blocks[0], slice(0, 1200)).view(40, 30)
        torch.testing.assert_close(along, m, rtol=1e-9, atol=1e-9)
        optimizer.apply(record)
        moved = (before - p.detach()) / 1e-3 / record.slopes[0]
        assert bool((moved * m >= 0).all())  # m over a positive root
        if step < 2:
            torch.testing.assert_close(moved, m, rtol=1e-6, atol=1e-6)


# -- MeZO-SVRG ----------------------------------------------------------------------------------------------------


class SVRGTwin(Twin):
    refresh, full_ratio = 4, 2.0

    def step(self, t: int) -> None:
        z = self.z(t)
        if t % self.refresh == 0:
            pos, neg = (self.whole(self.moved(z, side * self.eps)) for side in (1, -1))
            self.full, self.reference = times(z, (pos - neg) / (2 * self.eps)), self.theta
            self.theta = self.moved(self.full, -self.lr * self.full_ratio)
            return
        here, theta = self.slope(z, t), self.theta
        self.theta = self.reference
        there = self.slope(z, t)
        self.theta = theta
        self.theta = self.moved(plus(times(z, here - there), self.full), -self.lr)


def test_svrg_follows_the_formula() -> None:
    optimizer = follow("mezo-svrg", SVRGTwin(), options={"refresh": 4, "full_ratio": 2.0, "anneal": 1})
    assert {tuple(state) for state in optimizer.state.values()} == {("reference",)}


def test_the_control_variate_of_svrg_cancels_at_the_reference() -> None:
    """Where theta is the reference, a step on a batch is the full-batch estimate, whatever the batch."""
    parameters = [torch.nn.Parameter(tensor) for tensor in start()]
    whole = FullObjective(lambda: objective(parameters), forwards=4.5)
    optimizer = ZOOptimizer(parameters, lr=1e-4, eps=EPS, rule=SVRG(refresh=100), full=whole)
    full = optimizer.measure(lambda: objective(parameters, 1))
    optimizer.apply(full)
    for block in optimizer.blocks:
        block.parameter.data.copy_(optimizer.state[block.parameter]["reference"])
    record = optimizer.measure(lambda: objective(parameters, 1))
    assert record.numbers("reference") == record.losses[0]
    assert optimizer.rule.coefficients(optimizer, record) == (0.0,)
    assert (full.forwards, record.forwards) == (9, 4)


def test_svrg_anneals_its_rates_where_the_loss_rises_down_to_floors() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    whole = FullObjective(lambda: p.sum(), forwards=2)
    optimizer = ZOOptimizer([p], lr=1e-3, eps=EPS, rule=SVRG(refresh=2, full_ratio=10), full=whole)
    rates = []
    for step in range(16):
        record = optimizer.measure(lambda p=p: p.sum())
        record = replace(record, losses=((1.1**step + 1e-6, 1.1**step),))
        rates.append(optimizer.rule.rate(record, full=step % 2 == 0))
        optimizer.apply(record)
    assert rates[:5] == [10, 1, 10, 1, 2]  # after two epochs of two steps: divided by 5
    assert rates[-2:] == [pytest.approx(1e-2), pytest.approx(1e-3)]  # 1e-5 and 1e-6 over lr
    assert optimizer.memory["divisor"] > 1e4


def test_svrg_with_a_reference_in_every_step_is_mezo_on_all_examples() -> None:
    ends = []
    for rule in (None, SVRG(refresh=1, full_ratio=1)):
        parameters = [torch.nn.Parameter(tensor) for tensor in start(torch.float32)]
        whole = FullObjective(lambda parameters=parameters: objective(parameters), forwards=1)
        optimizer = ZOOptimizer(parameters, lr=1e-4, eps=EPS, rule=rule, full=whole)
        for _ in range(5):
            optimizer.step(lambda parameters=parameters: objective(parameters))
        ends.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    with pytest.raises(ConfigError, match="give the optimizer full=FullObjective"):
        ZOOptimizer(parameters, lr=1, eps=1, rule=SVRG()).step(lambda: objective(parameters))
    with pytest.raises(ConfigError, match="draws the directions of an earlier step again"):
        ZOOptimizer(parameters, lr=1, eps=1, rule=SVRG(), directions=Curvature(), full=whole)


# -- ZO-DAP -------------------------------------------------------------------------------------------------------


class DAPTwin(Twin):
    keep_first, one_sided = True, False

    def measured(self, u: Tensors, t: int) -> float:
        if not self.one_sided:
            return self.slope(u, t)
        return (self.loss(self.moved(u, self.eps), t) - self.loss(self.theta, t)) / self.eps

    def step(self, t: int) -> None:
        first = [self.z(t, p) for p in range(self.probes)]
        slopes = [self.measured(u, t) for u in first]
        a = [torch.zeros_like(x) for x in self.theta]
        for slope, u in zip(slopes, first, strict=True):
            a = plus(a, u, slope)
        estimates = list(zip(slopes, first, strict=True)) if self.keep_first else []
        for p in range(self.probes, 2 * self.probes):
            z = self.z(t, p)
            coin = 2 * (hashlib.sha256(f"{SEED}/{t}/{p}/coin".encode()).digest()[0] % 2) - 1
            size = math.sqrt(dot(a, a))
            v = plus(plus(z, a, -dot(z, a) / size**2), a, coin / size)
            assert dot(v, a) / size == pytest.approx(coin, abs=1e-9)
            estimates.append((self.measured(v, t), v))
        step = [torch.zeros_like(x) for x in self.theta]
        for slope, u in estimates:
            step = plus(step, u, slope / len(estimates))
        self.theta = self.moved(step, -self.lr)


@pytest.mark.parametrize("changes", [{}, {"keep_first": False, "one_sided": True}])
@pytest.mark.parametrize("probes", [1, 3])
def test_dap_follows_the_formula(probes: int, changes: dict) -> None:
    follow("zo-dap", DAPTwin(probes=probes, **changes), options=changes)


def test_dap_counts_its_forwards_and_without_alignment_is_mezo_bit_for_bit() -> None:
    for options, forwards in (({}, 8), ({"one_sided": True}, 5)):
        parameters = [torch.nn.Parameter(tensor) for tensor in start(torch.float32)]
        optimizer = ZOOptimizer(parameters, lr=1e-4, eps=EPS, probes=2, directions=Aligned(**options))
        assert optimizer.measure(lambda p=parameters: objective(p)).forwards == forwards
    twins = [torch.nn.Parameter(tensor) for tensor in start(torch.float32)]
    mezo = MeZO(twins, lr=1e-4, eps=EPS, probes=4)
    optimizer = ZOOptimizer(parameters, lr=1e-4, eps=EPS, probes=2, directions=Aligned())
    record = optimizer.measure(lambda: objective(parameters))
    assert all(kappa != 0 for kappa in record.numbers("kappa"))
    record = replace(record, extra={**record.extra, "kappa": (0.0, 0.0)})
    optimizer.apply(record)
    mezo.apply(replace(record, extra={}))
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


# -- ZO-Muon ------------------------------------------------------------------------------------------------------


class MuonTwin(LowRankTwin):
    rank, refresh, ratio = 3, 7, 1e-2

    def factors(self, i: int, t: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
        m, n = SHAPES[i][0], math.prod(SHAPES[i][1:])
        left = np.linalg.qr(numbers(f"{t // self.refresh}/left/{NAMES[i]}", m, self.rank).numpy())[0]
        return torch.from_numpy(left).float().double(), numbers(f"{t}/{p}/right/{NAMES[i]}", n, self.rank)

    def step(self, t: int) -> None:
        directions, slopes = [], []
        for p in range(self.probes):
            u = self.z(t, p)
            for i in range(len(u)):
                if self.matrix(i) is not None:
                    left, right = self.factors(i, t, p)
                    u[i] = (left @ right.T).view(SHAPES[i])
            directions.append(u)
            slopes.append(self.slope(u, t))
        for i, theta in enumerate(self.theta):
            mean = sum(s * u[i] for s, u in zip(slopes, directions, strict=True)) / self.probes
            if len(SHAPES[i]) < 2:
                update = self.ratio * mean
            elif self.matrix(i) is None:
                update = self.orthogonal(mean.reshape(SHAPES[i][0], -1)).view(SHAPES[i])
            else:
                psi = sum(s * self.factors(i, t, p)[1].T for p, s in enumerate(slopes)) / self.probes
                update = (self.factors(i, t, 0)[0] @ self.orthogonal(psi)).view(SHAPES[i])
            self.theta[i] = theta - self.lr * update

    @staticmethod
    def orthogonal(x: torch.Tensor) -> torch.Tensor:
        u, s, v = torch.linalg.svd(x / x.norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        return u @ torch.diag(s) @ v


def test_muon_follows_the_formula() -> None:
    """The twin iterates on singular values; the rule on matrices, with 1e-7 added to their norms."""
    options = {"rank": 3, "refresh": 7, "vector_ratio": 1e-2}
    follow("zo-muon", MuonTwin(probes=4, lr=1e-4), options=options)


def test_the_update_of_muon_has_singular_values_near_one_and_the_rank_of_its_subspace() -> None:
    p = torch.nn.Parameter(torch.randn(60, 80, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    optimizer = ZOOptimizer([("p", p)], lr=1.0, eps=1e-2, probes=4, directions=Subspace(rank=8), rule=Orthogonal())
    optimizer.step(lambda: (p**2).sum())
    values = torch.linalg.svdvals(p.detach() - before)
    assert bool(((values[:8] > 0.5) & (values[:8] < 1.3)).all()) and bool((values[8:] < 1e-4).all())
    assert float(msign(torch.zeros(3, 4), 5).abs().max()) == 0


# -- ZO-LDSD ------------------------------------------------------------------------------------------------------


class LDSDTwin(Twin):
    sigma, mean_rate = 0.5, 0.5

    def begin(self) -> None:
        self.mean = [torch.zeros_like(x) for x in self.theta]
        self.winners: list[int] = []

    def step(self, t: int) -> None:
        k = self.probes
        v = [plus(self.mean, self.z(t, p), self.sigma) for p in range(k)]
        f = [self.loss(self.moved(u, self.eps), t) for u in v]
        best = f.index(min(f))
        self.winners.append(best)
        slope = (f[best] - self.loss(self.moved(v[best], -self.eps), t)) / (2 * self.eps)
        self.theta = self.moved(v[best], -self.lr * slope)
        old = self.mean
        for u, loss in zip(v, f, strict=True):
            c = (k * loss - sum(f)) / (k - 1)
            self.mean = plus(self.mean, plus(u, old, -1), -self.mean_rate / (k * self.sigma**2) * c)


def test_ldsd_follows_the_formula() -> None:
    twin = LDSDTwin(probes=5)
    optimizer = follow("zo-ldsd", twin, options={"sigma": 0.5, "mean_rate": 0.5})
    assert set(twin.winners) == {0, 1, 2, 3, 4}
    for block, mean in zip(optimizer.blocks, twin.mean, strict=True):
        torch.testing.assert_close(optimizer.state[block.parameter]["mean"], mean, rtol=1e-8, atol=1e-9)


def test_the_mean_of_ldsd_learns_the_gradient() -> None:
    """E[step of the mean] = -rate eps gradient: over many steps at fixed weights; the released code's is 0."""
    p = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    g = torch.linspace(-1, 1, 20, dtype=torch.float64)
    optimizer = ZOOptimizer([("p", p)], lr=0.0, eps=1e-3, probes=5, directions=LearnedMean(mean_rate=1e-2))
    for _ in range(2000):
        optimizer.step(lambda: (g * p).sum())
    mean = optimizer.state[p]["mean"] / (-1e-2 * 1e-3 * 2000)
    assert float((mean - g).norm() / g.norm()) < 0.2
    assert optimizer.measure(lambda: (g * p).sum()).forwards == 6


# -- where they are MeZO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "probes"),
    [
        ({"directions": Curvature(alpha=0)}, 2),
        ({"directions": MomentumNoise(warmup=10, total_steps=20), "rule": UncertainSteps()}, 2),
        ({"directions": LearnedMean()}, 1),
        ({"directions": Subspace(rank=999), "rule": Orthogonal(newton_schulz=0, vector_ratio=1)}, 2),
    ],
)
def test_turned_off_it_is_mezo_bit_for_bit(parts, probes: int, tiny_model) -> None:
    plain, other = (tiny_model("llama", torch.bfloat16) for _ in range(2))
    mezo = MeZO(plain, lr=1e-2, eps=EPS, probes=probes)
    optimizer = ZOOptimizer(other, lr=1e-2, eps=EPS, probes=probes, **parts)
    for _ in range(3):
        mezo.step(lambda: plain(IDS, labels=IDS).loss)
        optimizer.step(lambda: other(IDS, labels=IDS).loss)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_mistakes_are_told() -> None:
    p = torch.nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ConfigError, match="anneals over the run: give its length as total_steps"):
        get_method("zo-adamu").make([p], options={"warmup": 0}).step(lambda: p.sum())
    with pytest.raises(ConfigError, match="give MomentumNoise, too"):
        ZOOptimizer([p], lr=1, eps=1, rule=UncertainSteps()).step(lambda: p.sum())
    with pytest.raises(ConfigError, match="give Subspace, too"):
        ZOOptimizer([p], lr=1, eps=1, rule=Orthogonal()).step(lambda: p.sum())
