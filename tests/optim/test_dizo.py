"""DiZO: a twin of algorithm 1, its clip and cycle, the first-order form, replay, the rejected alternatives."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.optim.twins import SEED, Twin, follow, objective, start
from zoft.errors import ConfigError, ModelError
from zoft.optim import DiZO, FirstOrderDiZO, MeZO, Momentum, ProjectionRecord, ZOFineTuner, ZOOptimizer, get_method
from zoft.tuner.networks import PertNN
from zoft.weights.vectors import install_fp32_vectors

IDS = torch.arange(3, 27).view(2, 12)
PROJECTED = (0, 2)  # q_proj and v_proj of the twins' blocks


class DiZOTwin(Twin):
    cycle, inner, radius, rate, tau, relative, reinitialise = 5, 3, 0.01, 1e-5, 0.2, False, True
    anchor, project = "base", "weights"

    def begin(self) -> None:
        self.base, self.gamma = start(), None
        self.rates = [1.0] * len(self.theta)

    def step(self, t: int) -> None:
        before = [tensor.clone() for tensor in self.theta]
        z = self.z(t)
        p = self.slope(z, t)
        self.theta = [x - self.lr * r * p * u for x, u, r in zip(self.theta, z, self.rates, strict=True)]
        if (t + 1) % self.cycle == 0:
            anchor = self.base if (self.anchor, self.project) == ("base", "weights") else before
            self.projected(t, anchor)

    def at(self, anchor, gamma) -> list[torch.Tensor]:
        theta = list(self.theta)
        for i, g in zip(PROJECTED, gamma, strict=True):
            displacement = self.theta[i] - anchor[i]
            theta[i] = anchor[i] + float(g) / displacement.norm() * displacement
        return theta

    def projected(self, t: int, anchor) -> None:
        norms = np.array([float((self.theta[i] - anchor[i]).norm()) for i in PROJECTED])
        low, high = (1 - self.tau) * norms, (1 + self.tau) * norms
        gamma = norms.copy() if self.reinitialise or self.gamma is None else np.clip(self.gamma, low, high)
        for k in range(self.inner):
            gamma = np.clip(self.better(t, k, anchor, gamma, norms), low, high)
        self.gamma = gamma
        if self.project == "lr":
            for i, r in zip(PROJECTED, gamma / norms, strict=True):
                self.rates[i] = float(r)
        else:
            self.theta = self.at(anchor, gamma)

    def better(self, t, k, anchor, gamma, norms):
        zeta = np.random.Generator(np.random.Philox(key=[SEED, 2 + t * self.inner + k])).standard_normal(len(norms))
        if self.relative:
            limit = self.tau / self.radius * norms
            zeta = np.clip(zeta, -limit, limit)
        pos, neg = (self.loss(self.at(anchor, gamma + s * self.radius * zeta), t) for s in (1, -1))
        rate = self.rate * norms if self.relative else self.rate
        return gamma - rate * (pos - neg) / (2 * self.radius) * zeta


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"relative": True, "rate": 1e-4},
        {"reinitialise": False},
        {"anchor": "previous"},
        {"project": "lr"},
    ],
)
def test_dizo_follows_algorithm_1(changes: dict) -> None:
    options = {"cycle": 5, "inner": 3, "radius": 0.01, "rate": 1e-5, "tau": 0.2, **changes}
    records: list = []
    follow("dizo", DiZOTwin(**options), options=options, journal=records.append)
    ratios = [ratio for record in records if isinstance(record, ProjectionRecord) for ratio in record.ratios]
    assert len(ratios) == 2 * 10 and len(set(ratios)) > 2
    assert all(0.8 <= ratio <= 1.2 for ratio in ratios)


class FirstOrderTwin(DiZOTwin):
    rate = 1e-2

    def projected(self, t: int, anchor) -> None:
        self.parameters, self.adam = None, None
        super().projected(t, anchor)

    def better(self, t, k, anchor, gamma, norms):
        if self.parameters is None:
            self.parameters = [torch.nn.Parameter(torch.tensor(g, dtype=torch.float64)) for g in gamma]
            self.adam = torch.optim.Adam(self.parameters, lr=self.rate)
        theta = list(self.theta)
        for parameter, g in zip(self.parameters, gamma, strict=True):
            parameter.data = torch.tensor(g, dtype=torch.float64)
        for i, parameter in zip(PROJECTED, self.parameters, strict=True):
            displacement = self.theta[i] - anchor[i]
            theta[i] = anchor[i] + parameter / displacement.norm() * displacement
        self.adam.zero_grad()
        objective(theta, t % 2).backward()
        self.adam.step()
        return np.array([float(parameter.detach()) for parameter in self.parameters])


def test_the_first_order_form_is_adam_on_gamma() -> None:
    options = {"cycle": 5, "inner": 4, "rate": 1e-2, "tau": 0.3}
    follow("dizo-fo", FirstOrderTwin(**options), options=options)


def run(model, projection, steps: int = 6, dtype: torch.dtype = torch.bfloat16, **settings):
    records: list = []
    optimizer = ZOOptimizer(model, lr=1e-2, eps=1e-3, seed=3, projection=projection, journal=records.append, **settings)
    for _ in range(steps):
        optimizer.step(lambda: model(IDS, labels=IDS).loss)
    return optimizer, records


@pytest.mark.parametrize(
    "projection", [DiZO(cycle=2, inner=2), FirstOrderDiZO(cycle=2, inner=2), DiZO(cycle=2, project="lr")]
)
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_records_replay_bit_for_bit_in_half_precision(projection, family: str, tiny_model) -> None:
    model = tiny_model(family, torch.bfloat16)
    install_fp32_vectors(model)
    base = copy.deepcopy(model)
    _, records = run(model, projection, weight_decay=0.1)
    assert [type(record).__name__[:4] for record in records] == ["Step", "Step", "Proj"] * 3
    assert all(record.ratios and any(ratio != 1 for ratio in record.ratios) for record in records[2::3])
    replayed = ZOOptimizer(base, lr=0, eps=1, seed=3, projection=projection, weight_decay=0.1)
    for record in records:
        replayed.apply(record)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


@pytest.mark.parametrize("make", [DiZO, FirstOrderDiZO])
def test_the_length_of_a_displacement_stays_within_tau(make, tiny_model) -> None:
    """A rate far too high drives gamma to its bounds, and not beyond; other blocks are MeZO's."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    base = copy.deepcopy(model)
    optimizer, records = run(model, make(cycle=6, inner=3, rate=1e6, tau=0.25))
    run(plain, None)
    (projection,) = [record for record in records if isinstance(record, ProjectionRecord)]
    assert all(round(ratio, 12) in (0.75, 1.0, 1.25) for ratio in projection.ratios)
    assert {round(ratio, 12) for ratio in projection.ratios} >= {0.75, 1.25}
    named = dict(base.named_parameters())
    projected = {
        block.name: ratio for block, ratio in zip(DiZO().blocks_of(optimizer.blocks), projection.ratios, strict=True)
    }
    assert len(projected) == 4 and all("q_proj" in name or "v_proj" in name for name in projected)
    for (name, moved), mezo in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name not in projected:
            assert torch.equal(moved, mezo)
            continue
        length = (mezo - named[name]).norm()
        assert ((moved - named[name]).norm() / length).item() == pytest.approx(projected[name], rel=1e-5)


def test_with_tau_zero_it_is_mezo_bit_for_bit(tiny_model) -> None:
    plain, other = (tiny_model("llama", torch.bfloat16) for _ in range(2))
    run(plain, None)
    run(other, DiZO(cycle=2, inner=2, tau=0))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_forwards_are_counted_as_they_were_taken(tiny_model) -> None:
    for projection, each in ((DiZO(cycle=3, inner=4), 8), (FirstOrderDiZO(cycle=3, inner=4), 12)):
        counted = 0
        model = tiny_model("llama")
        records: list = []
        optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-3, projection=projection, journal=records.append)
        optimizer.verify(lambda: 0.0)

        def closure(model=model) -> torch.Tensor:
            nonlocal counted
            counted += 1
            return model(IDS, labels=IDS).loss

        for _ in range(3):
            optimizer.step(closure)
        assert sum(record.forwards for record in records) == 6 + each
        assert counted == 6 + (each if each == 8 else 4)  # a backward pass counts two more
        assert all(p.grad is None for p in model.parameters())


def test_the_only_copy_is_of_the_projected_blocks(tiny_model) -> None:
    model = tiny_model("llama")
    optimizer, _ = run(model, DiZO(cycle=4, inner=1))
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    assert held == sum(p.numel() for n, p in model.named_parameters() if "q_proj.weight" in n or "v_proj.weight" in n)


def test_a_projection_that_meets_nan_changes_nothing(tiny_model) -> None:
    model = tiny_model("llama")
    optimizer, _ = run(model, DiZO(cycle=3, inner=2), steps=2)
    optimizer.apply(optimizer.measure(lambda: model(IDS, labels=IDS).loss))
    before = copy.deepcopy(model.state_dict())
    record = optimizer.project(iter([1.0, float("nan"), 1.0, 1.0]).__next__)
    assert record is not None and record.ratios == () and record.forwards == 4
    optimizer.apply(record)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_goes_with_a_tuner_and_with_momentum(tiny_model) -> None:
    model = tiny_model("llama")
    base = copy.deepcopy(model)
    records: list = []
    names = [name for name, _ in model.named_parameters()]
    tuned = ZOFineTuner(
        model,
        PertNN(names),
        lr=1e-2,
        eps=1e-3,
        projection=DiZO(cycle=2, inner=1),
        rule=Momentum(),
        journal=records.append,
    )
    for _ in range(4):
        tuned.step(lambda: model(IDS, labels=IDS).loss)
    replayed = MeZO(base, lr=0, eps=1, projection=DiZO(cycle=2, inner=1), rule=Momentum())
    for record in records:
        replayed.apply(record)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


def test_mistakes_are_told(tiny_model) -> None:
    with pytest.raises(ModelError, match=r"none of these; it has .*query_key_value.*options.targets"):
        get_method("dizo").make(tiny_model("gpt_neox"))
    model = tiny_model("llama")
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-3, projection=FirstOrderDiZO(cycle=1))
    optimizer.verify(lambda: 0.0)
    optimizer.apply(optimizer.measure(lambda: 1.0))
    with pytest.raises(ConfigError, match="dizo-fo takes gradients, and the objective gives a number without one"):
        optimizer.project(lambda: 1.0)
    with pytest.raises(ConfigError, match="the projection is of step 7, the optimizer is at step 1"):
        optimizer.apply(replace(ProjectionRecord(0, (), (), (), 0), step=7))
