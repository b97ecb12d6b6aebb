"""MeZO on the engine: a float64 twin of the formula, closed forms, learning, and the contract of the seam."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import FAMILIES
from tests.noise.test_noise import reference_z
from zoft.errors import ConfigError, ModelError
from zoft.noise.rounding import Dither
from zoft.noise.table import chunk_length
from zoft.optim import MeZO, StepRecord, get_method
from zoft.weights.blocks import trainable_blocks
from zoft.weights.vectors import install_fp32_vectors

IDS = torch.arange(3, 27).view(2, 12)


def quadratic(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def named(parameters: list[torch.nn.Parameter]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"block{i}", parameter) for i, parameter in enumerate(parameters)]


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_follow_the_formula(probes: int, weight_decay: float) -> None:
    """theta <- (1 - lr wd) theta - lr/q sum_p slope_p z_p, written out in float64 beside the optimizer."""
    parameters = quadratic((40, 30), (7,), (3, 5, 4))
    twins = [parameter.detach().clone() for parameter in parameters]
    lr, eps, seed = 1e-4, 1e-3, 9

    def objective(tensors: list[torch.Tensor]) -> torch.Tensor:
        return sum(((tensor - 0.3) ** 2).sum() + torch.sin(tensor).sum() for tensor in tensors)  # type: ignore[return-value]

    optimizer = MeZO(named(parameters), lr=lr, eps=eps, probes=probes, weight_decay=weight_decay, seed=seed)
    for step in range(50):
        directions = [
            [torch.from_numpy(reference_z(seed, step, p, f"block{i}", tuple(t.shape))) for i, t in enumerate(twins)]
            for p in range(probes)
        ]
        slopes = []
        for z in directions:
            pos, neg = (objective([t + sign * eps * zi for t, zi in zip(twins, z, strict=True)]) for sign in (1, -1))
            slopes.append((pos - neg) / (2 * eps))
        twins = [t * (1 - lr * weight_decay) if t.ndim > 1 else t for t in twins]
        for slope, z in zip(slopes, directions, strict=True):
            twins = [t - lr / probes * slope * zi for t, zi in zip(twins, z, strict=True)]
        optimizer.step(lambda: objective(parameters))
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter.detach(), twin, rtol=1e-9, atol=1e-9)


def test_one_step_on_a_quadratic_has_a_closed_form() -> None:
    """On |p|^2 / 2 the central difference is exact: p1 = p0 - lr (p0 . z) z."""
    p0 = torch.arange(4.0, dtype=torch.float64)
    p = torch.nn.Parameter(p0.clone())
    MeZO([("p", p)], lr=0.1, eps=1e-3, seed=3).step(lambda: p.square().sum() / 2)
    z = torch.from_numpy(reference_z(3, 0, 0, "p", (4,)))
    torch.testing.assert_close(p.detach(), p0 - 0.1 * (p0 @ z) * z, rtol=1e-9, atol=1e-12)


def test_the_slope_estimates_the_gradient_without_bias() -> None:
    """E[slope z] = gradient; the mean of n draws in d dimensions is off by about |g| sqrt((d + 1) / n)."""
    p = quadratic((8,))[0]
    gradient = 2 * p.detach() - 1
    optimizer = MeZO([("p", p)], lr=0.0, eps=1e-3, probes=4000)
    record = optimizer.measure(lambda: (p.square() - p).sum())
    z = torch.stack([torch.from_numpy(reference_z(0, 0, probe, "p", (8,))) for probe in range(4000)])
    estimate = (torch.tensor(record.slopes)[:, None] * z).mean(0)
    assert (estimate - gradient).norm() < 2 * gradient.norm() * math.sqrt(9 / 4000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master_weights", [False, True])
def test_converges_on_a_quadratic_in_every_precision(dtype: torch.dtype, master_weights: bool) -> None:
    (p,) = quadratic((10, 10), dtype=dtype)
    optimizer = MeZO([("p", p)], lr=2e-3, eps=1e-1, seed=1, master_weights=master_weights)
    start = p.float().square().sum().item()
    for _ in range(400):
        optimizer.step(lambda: p.double().square().sum())
    assert p.float().square().sum().item() < 0.1 * start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(700, 900), (2, 70_000), (300,), (3, 5, 7)])
def test_the_sweep_equals_a_plain_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Buffers, windows and strides against whole tensors: the same bits, at several sizes of chunk."""
    weights = quadratic(shape, dtype=dtype)
    optimizer = MeZO(named(weights), lr=0.0, eps=1.0, probes=2, weight_decay=0.25, seed=3)
    record = StepRecord(0, 3, lr=(1e-3,), eps=1e-3, losses=((1.5, 1.25), (1.0, 1.75)), scales=(0.7,))
    theta = weights[0].detach().float().numpy().astype(np.float32)
    if len(shape) > 1:
        theta = theta * np.float32(1 - 1e-3 * 0.25)
    for probe, slope in enumerate((125.0, -375.0)):
        z = np.asarray(reference_z(3, 0, probe, "block0", shape), dtype=np.float32)
        theta = theta - z * np.float32(1e-3 * (slope / 2) * 0.7)
    expected = torch.from_numpy(theta).view(-1)
    if dtype != torch.float32:
        rounded = torch.empty(expected.shape, dtype=dtype)
        length = chunk_length(optimizer.blocks[0])
        for lo in range(0, len(expected), length):
            dither = Dither(optimizer.blocks[0], "3/0/dither/block0", 3)
            dither.round_(expected[lo : lo + length].clone(), lo, rounded[lo : lo + length])
        expected = rounded
    optimizer.apply(record)
    assert torch.equal(weights[0].detach().view(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_records_replay_bit_for_bit_without_data(family: str, dtype: torch.dtype, tiny_model) -> None:
    model = tiny_model(family, dtype=dtype)
    install_fp32_vectors(model)
    base = copy.deepcopy(model)
    records: list[StepRecord] = []
    optimizer = MeZO(model, lr=1e-3, eps=1e-3, probes=2, weight_decay=0.1, seed=5, journal=records.append)
    for _ in range(5):
        optimizer.step(lambda: model(IDS, labels=IDS).loss)
    replayed = MeZO(base, lr=0.0, eps=1.0, probes=2, weight_decay=0.1, seed=5)
    for record in records:
        replayed.apply(record)
    for (name, tensor), other in zip(model.state_dict().items(), base.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("master_weights", [False, True])
def test_resuming_from_a_state_dict_equals_going_on(master_weights: bool, tiny_model) -> None:
    def steps(model: torch.nn.Module, optimizer: MeZO, count: int) -> None:
        for _ in range(count):
            optimizer.step(lambda: model(IDS, labels=IDS).loss)

    unbroken = tiny_model("llama", torch.bfloat16)
    steps(unbroken, MeZO(unbroken, lr=1e-3, eps=1e-3, master_weights=master_weights), 6)
    broken = tiny_model("llama", torch.bfloat16)
    first = MeZO(broken, lr=1e-3, eps=1e-3, master_weights=master_weights)
    steps(broken, first, 3)
    second = MeZO(broken, lr=1.0, eps=1.0, master_weights=master_weights)
    second.load_state_dict(first.state_dict())
    steps(broken, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), broken.parameters(), strict=True))


def test_measuring_moves_nothing_and_is_repeatable(tiny_model) -> None:
    model = tiny_model("gemma")
    before = copy.deepcopy(model.state_dict())
    optimizer = MeZO(model, lr=1e-3, eps=1e-3, probes=2)
    first, second = (optimizer.measure(lambda: model(IDS, labels=IDS).loss) for _ in range(2))
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_are_one_block_and_stay_tied(tiny_model) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=True)
    optimizer = MeZO(model, lr=1e-2, eps=1e-3)
    assert [block.name for block in optimizer.blocks].count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in [block.name for block in optimizer.blocks]
    optimizer.step(lambda: model(IDS, labels=IDS).loss)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_frozen_weights_do_not_move(tiny_model) -> None:
    model = tiny_model("opt", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    before = copy.deepcopy(model.state_dict())
    MeZO(model, lr=1e-1, eps=1e-3).step(lambda: model(IDS, labels=IDS).loss)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "q_proj" in name}


def test_schedulers_and_groups_set_the_learning_rate() -> None:
    first, second = quadratic((3,), (3,))
    optimizer = MeZO([{"params": [("a", first)]}, {"params": [("b", second)], "lr": 0.5}], lr=1.0, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    rates = []
    for _ in range(2):
        optimizer.journal = lambda record: rates.append(record.lr)
        optimizer.step(lambda: 0.0)
        scheduler.step()
    assert rates == [(1.0, 0.5), (0.1, 0.05)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(bad: float) -> None:
    (p,) = quadratic((3,))
    before = p.detach().clone()
    optimizer = MeZO([("p", p)], lr=1.0, eps=1e-3, weight_decay=0.1)
    optimizer.verify(lambda: 0.0)
    record = optimizer.measure(iter([bad, 1.0]).__next__)
    optimizer.apply(record)
    assert record.skipped
    assert torch.equal(p, before)
    assert optimizer.step_number == 1


def test_a_black_box_objective_needs_no_gradient() -> None:
    """Minimise the number of positive entries: piecewise constant, no torch graph at all."""
    (p,) = quadratic((50,), dtype=torch.float32)
    optimizer = MeZO([("p", p)], lr=0.05, eps=0.5, probes=4)
    start = int((p > 0).sum())
    for _ in range(200):
        optimizer.step(lambda: int((p > 0).sum()))
    assert int((p > 0).sum()) < start / 2


@settings(max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**63 - 1), st.integers(1, 3))
def test_blocks_of_any_shape_and_seed(shape: list[int], seed: int, probes: int) -> None:
    """The order of the blocks and the company of other blocks change nothing but the losses measured."""
    one, two = (quadratic(tuple(shape), (2, 2)) for _ in range(2))
    record = StepRecord(0, seed, (0.1,), 1e-3, ((1.0, 0.9),) * probes)
    MeZO([("a", one[0]), ("b", one[1])], lr=0.1, eps=1e-3, seed=seed).apply(record)
    MeZO([("b", two[1]), ("a", two[0])], lr=0.1, eps=1e-3, seed=seed).apply(record)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", -1.0, "0 or more"),
        ("lr", float("nan"), "0 or more"),
        ("eps", 0.0, "more than 0"),
        ("probes", 0, "1 or more"),
        ("weight_decay", -0.1, "0 or more"),
        ("seed", -1, "0 or more, and less than 2\\*\\*63"),
        ("seed", 2**63, "0 or more, and less than 2\\*\\*63"),
    ],
)
def test_a_setting_out_of_bounds_is_named_with_its_bounds(name: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is {value}: expected {expected}$"):
        MeZO([quadratic((2, 3))[0]], **{"lr": 1.0, "eps": 1e-3, name: value})


def test_mistakes_are_errors_that_name_them() -> None:
    p = quadratic((2, 3))[0]
    MeZO([p], lr=0.0, eps=1e-3, weight_decay=0.0, seed=0)
    with pytest.raises(ModelError, match="same name, 'a'"):
        MeZO([("a", p), ("a", quadratic((2,))[0])], lr=1.0, eps=1e-3)
    with pytest.raises(ModelError, match="no trainable parameters"):
        MeZO(torch.nn.Linear(2, 2).requires_grad_(False), lr=1.0, eps=1e-3)
    with pytest.raises(ModelError, match="not contiguous"):
        MeZO([("a", torch.nn.Parameter(torch.ones(2, 3).T))], lr=1.0, eps=1e-3)
    with pytest.raises(ConfigError, match="step 4, the optimizer is at step 0"):
        MeZO([p], lr=1.0, eps=1e-3).apply(StepRecord(4, 0, (1.0,), 1e-3, ((1.0, 0.0),)))
    with pytest.raises(ConfigError, match="did you mean 'mezo'"):
        get_method("mzo")


def test_a_model_with_dropout_is_warned_of() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.Dropout(0.5))
    with pytest.warns(UserWarning, match="not deterministic"):
        MeZO(model, lr=1e-3, eps=1e-3).step(lambda: model(torch.ones(1, 4)).square().sum())


def test_a_block_is_not_copied(tiny_model) -> None:
    """The optimizer holds the model's own parameters and no tensor of their size."""
    model = tiny_model("llama")
    optimizer = MeZO(model, lr=1e-3, eps=1e-3)
    optimizer.step(lambda: model(IDS, labels=IDS).loss)
    assert [id(b.parameter) for b in optimizer.blocks] == [id(b.parameter) for b in trainable_blocks(model)]
    assert not optimizer.state
