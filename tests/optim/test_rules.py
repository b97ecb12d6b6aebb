"""Momentum, Adam, scalar Adam, sign, conservative; layers and small weights: twins, closed forms, properties."""

import hashlib
import math

import pytest
import torch

from tests.optim.twins import EPS, LR, NAMES, SEED, Twin, follow, objective, start
from zoft.errors import ConfigError, ModelError
from zoft.optim import AdamSteps, Layers, MeZO, Momentum, ScalarAdam, SmallWeights, StepRecord, ZOOptimizer, get_method
from zoft.weights.blocks import layers_of


class MomentumTwin(Twin):
    beta, heavy_ball = 0.9, False

    def begin(self) -> None:
        self.m = [torch.zeros_like(t) for t in self.theta]

    def step(self, t: int) -> None:
        share = 1.0 if self.heavy_ball else 1 - self.beta
        self.m = [self.beta * m + share * g for m, g in zip(self.m, self.gradient(t), strict=True)]
        self.theta = self.moved(self.m, -self.lr)


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("heavy_ball", [False, True])
def test_momentum_follows_the_formula(probes: int, heavy_ball: bool) -> None:
    twin = MomentumTwin(probes=probes, heavy_ball=heavy_ball)
    optimizer = follow("mezo-momentum", twin, options={"heavy_ball": heavy_ball})
    for block, m in zip(optimizer.blocks, twin.m, strict=True):
        torch.testing.assert_close(optimizer.state[block.parameter]["momentum"], m, rtol=1e-9, atol=1e-9)


class AdamTwin(Twin):
    """torch's own Adam, fed with the estimate."""

    def begin(self) -> None:
        self.parameters = [torch.nn.Parameter(t) for t in self.theta]
        self.adam = torch.optim.Adam(self.parameters, lr=self.lr)

    def step(self, t: int) -> None:
        for parameter, g in zip(self.parameters, self.gradient(t), strict=True):
            parameter.grad = g
        self.adam.step()
        self.theta = [parameter.detach() for parameter in self.parameters]


@pytest.mark.parametrize("probes", [1, 2])
def test_adam_is_torchs_adam_on_the_estimate(probes: int) -> None:
    follow("mezo-adam", AdamTwin(probes=probes, lr=1e-3))


class ScalarAdamTwin(Twin):
    beta = 0.9

    def begin(self) -> None:
        self.v = 0.0

    def step(self, t: int) -> None:
        z = self.z(t)
        p = self.slope(z, t)
        self.v = self.beta * self.v + (1 - self.beta) * p**2
        self.theta = self.moved(z, -self.lr * p / (math.sqrt(self.v / (1 - self.beta ** (t + 1))) + 1e-8))


def test_scalar_adam_follows_the_formula() -> None:
    follow("scalar-adam", ScalarAdamTwin(), options={"beta": 0.9})


def test_scalar_adam_does_not_depend_on_the_scale_of_the_loss() -> None:
    """What Adam has over SGD: a loss times 1000 takes the same steps."""
    ends = []
    for scale in (1.0, 1000.0):
        parameters = [torch.nn.Parameter(t) for t in start()]
        optimizer = ZOOptimizer(parameters, lr=1e-3, eps=EPS, rule=ScalarAdam(epsilon=1e-12))
        for _ in range(10):
            optimizer.step(lambda scale=scale, parameters=parameters: scale * objective(parameters))
        ends.append(parameters[0].detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


class SignTwin(Twin):
    scalar = False

    def step(self, t: int) -> None:
        if self.scalar:
            z = self.z(t)
            self.theta = self.moved(z, -self.lr * math.copysign(1, self.slope(z, t)))
        else:
            self.theta = self.moved([torch.sign(g) for g in self.gradient(t)], -self.lr)


@pytest.mark.parametrize("scalar", [False, True])
def test_sign_follows_the_formula(scalar: bool) -> None:
    follow("zo-sign", SignTwin(scalar=scalar), options={"scalar": scalar})


def test_scalar_sign_is_mezo_where_the_slope_is_one() -> None:
    record = StepRecord(0, SEED, (0.1,), 0.5, ((2.0, 1.0),))
    assert record.slopes == (1.0,)
    ends = []
    for method, options in (("mezo", {}), ("zo-sign", {"scalar": True})):
        parameters = [torch.nn.Parameter(t) for t in start()]
        get_method(method).make(parameters, options=options, seed=SEED).apply(record)
        ends.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class ConservativeTwin(Twin):
    def begin(self) -> None:
        self.taken: list[int] = []

    def step(self, t: int) -> None:
        g = self.gradient(t)
        points = [self.moved(g, -self.lr), self.theta, self.moved(g, self.lr)]
        losses = [self.loss(point, t) for point in points]
        self.taken.append(losses.index(min(losses)))
        self.theta = points[self.taken[-1]]


@pytest.mark.parametrize(("probes", "lr"), [(1, 1.4e-3), (2, 3e-3)])
def test_conservative_follows_the_formula(probes: int, lr: float) -> None:
    """At this rate a step is at times too long: forth and none both occur."""
    twin = ConservativeTwin(lr=lr, probes=probes)
    follow("zo-conservative", twin)
    assert {0, 1} <= set(twin.taken)


def test_conservative_never_ends_higher_and_is_mezo_where_every_step_helps() -> None:
    parameters = [torch.nn.Parameter(t) for t in start()]
    optimizer = get_method("zo-conservative").make(parameters, lr=1e-2, seed=SEED)
    for _ in range(20):
        before = objective(parameters).item()
        optimizer.step(lambda: objective(parameters))
        assert objective(parameters).item() <= before
    small, mezo = (
        get_method(name).make([torch.nn.Parameter(t) for t in start()], lr=1e-6, seed=SEED)
        for name in ("zo-conservative", "mezo")
    )
    for optimizer in (small, mezo):
        held = [block.parameter for block in optimizer.blocks]
        for _ in range(5):
            optimizer.step(lambda held=held: objective(held))
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(small.blocks, mezo.blocks, strict=True))


class LayersTwin(Twin):
    keep = 0.5

    def step(self, t: int) -> None:
        keys = {layer: hashlib.sha256(f"{SEED}/{t}/layer/{layer}".encode()).digest() for layer in ("0", "1")}
        chosen = min(keys, key=lambda layer: keys[layer])
        left_out = [f"layers.{layer}." for layer in "01" if layer != chosen]
        u = [z * (not name.startswith(tuple(left_out))) for name, z in zip(NAMES, self.z(t), strict=True)]
        self.theta = self.moved(u, -self.lr * self.slope(u, t))


def test_lezo_follows_the_formula() -> None:
    follow("lezo", LayersTwin(), options={"keep": 0.5})


def test_lezo_reads_a_layer_that_sits_out_as_it_stands(tiny_model) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    optimizer = get_method("lezo").make(model, lr=1e-2, options={"keep": 0.25})
    before = {block.name: block.parameter.detach().clone() for block in optimizer.blocks}
    ids = torch.arange(3, 27).view(2, 12)
    optimizer.step(lambda: model(ids, labels=ids).loss)
    moved = {
        b.name.split(".")[2]
        for b in optimizer.blocks
        if not torch.equal(b.parameter, before[b.name]) and "layers" in b.name
    }
    assert len(moved) == 1
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    chosen = [tuple(Layers().chosen(layers_of(optimizer.blocks), 0, step)) for step in range(200)]
    assert all(chosen.count((layer,)) > 20 for layer in "0123")  # 50 in the mean


class SparseTwin(Twin):
    keep = 0.25

    def begin(self) -> None:
        self.h = [t.float().abs().flatten().kthvalue(max(1, round(self.keep * t.numel()))).values for t in self.theta]

    def step(self, t: int) -> None:
        u = [z * (theta.float().abs() <= h) for z, theta, h in zip(self.z(t), self.theta, self.h, strict=True)]
        self.theta = self.moved(u, -self.lr * self.slope(u, t))


def test_sparse_mezo_follows_the_formula() -> None:
    follow("sparse-mezo", SparseTwin(), options={"keep": 0.25})


def test_the_mask_of_sparse_mezo_is_the_same_at_both_ends_of_a_probe_and_in_the_update() -> None:
    """Large weights are not moved by a probe (seen by the objective) nor by the update, however large eps is."""
    parameters = [torch.nn.Parameter(t) for t in start()]
    optimizer = get_method("sparse-mezo").make(parameters, lr=1e-1, eps=10.0, options={"keep": 0.5})
    before = [p.detach().clone() for p in parameters]
    large = [p.abs() > p.abs().flatten().kthvalue(round(p.numel() / 2)).values for p in before]
    seen = []

    def closure() -> torch.Tensor:
        seen.append([p * 1.0 for p in parameters])
        return objective(parameters)

    optimizer.verify(lambda: 0.0)
    optimizer.step(closure)
    for weights in (*seen, parameters):
        for now, then, mask in zip(weights, before, large, strict=True):
            assert torch.equal(now[mask], then[mask])
            assert (now[~mask] != then[~mask]).double().mean() > 0.9


@pytest.mark.parametrize(
    ("directions", "rule"),
    [
        (Layers(keep=1), None),
        (SmallWeights(keep=1), None),
        (None, Momentum(beta=0)),
        (None, Momentum(beta=0, heavy_ball=True)),
    ],
)
def test_turned_off_it_is_mezo_bit_for_bit_and_holds_no_state(directions, rule, tiny_model) -> None:
    ids = torch.arange(3, 27).view(2, 12)
    plain, other = (tiny_model("llama", torch.bfloat16) for _ in range(2))
    mezo = MeZO(plain, lr=LR, eps=EPS, probes=2)
    optimizer = ZOOptimizer(other, lr=LR, eps=EPS, probes=2, directions=directions, rule=rule)
    for _ in range(4):
        mezo.step(lambda: plain(ids, labels=ids).loss)
        optimizer.step(lambda: other(ids, labels=ids).loss)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert not optimizer.state


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match=r"method lezo has no option 'kep'; did you mean 'keep'\? there are keep"):
        get_method("lezo").make([torch.nn.Parameter(torch.ones(2))], options={"kep": 1})
    with pytest.raises(ConfigError, match="keep: input should be less than or equal to 1, found 2"):
        Layers(keep=2)
    with pytest.raises(ConfigError, match="AdamSteps has no option 'beta'; there are beta1, beta2, epsilon"):
        AdamSteps(beta=0.5)
    with pytest.raises(ModelError, match="lezo draws layers, and no block has a layer number in its name"):
        ZOOptimizer([("w", torch.nn.Parameter(torch.ones(2)))], lr=1, eps=1, directions=Layers())
    with pytest.raises(ConfigError, match="mezo-adam and mezo-momentum cannot be combined: each has its own rule"):
        get_method("mezo-adam+mezo-momentum")
