"""The batched networks against one network at a time, their start at MeZO, and the published form number for number."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoft.tuner.features import Recurrent, inputs_raw, inputs_scaled
from zoft.tuner.networks import PertNN, group_of
from zoft.tuner.normalisation import normalise

NAMES = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("v_proj", "norm")] + ["model.embed.weight"]
SIZES = torch.tensor([400.0, 20.0] * 3 + [5000.0])


def some_state(seed: int = 0) -> tuple[torch.Tensor, Recurrent]:
    generator = torch.Generator().manual_seed(seed)
    statistics = torch.rand(len(NAMES), 2, generator=generator, dtype=torch.float64)
    return statistics, Recurrent(1.2, 1.1, 0.5 + torch.rand(len(NAMES), generator=generator, dtype=torch.float64))


@given(st.floats(-1e3, 1e3), st.floats(0, 1e6), st.floats(-1e3, 1e3), st.floats(1e-9, 1e6))
def test_an_untrained_tuner_is_exactly_mezo_at_any_input(mean: float, variance: float, loss: float, s: float) -> None:
    net = PertNN(NAMES)
    statistics = torch.tensor([[mean, variance]] * len(NAMES), dtype=torch.float64)
    before = Recurrent(loss, loss + 0.01, torch.full((len(NAMES),), s, dtype=torch.float64))
    assert inputs_scaled(statistics, before).isfinite().all()
    sigma = net(statistics, before)
    assert torch.equal(sigma, torch.ones(len(NAMES)))
    assert torch.equal(normalise(sigma, SIZES), torch.ones(len(NAMES), dtype=torch.float64))


def test_the_paper_form_number_for_number() -> None:
    """sigma = |w2 . tanh(W1 x + b1) + b2| on [mean, var, L+, L-, sigma before]; c = sqrt(d / sum d_j sigma_j^2)."""
    net = PertNN.paper(NAMES, seed=3)
    statistics, before = some_state()
    (level,) = net.levels
    plain = []
    for i in range(len(NAMES)):
        network = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        state = {"0.weight": level.w1[i], "0.bias": level.b1[i]}
        state |= {"2.weight": level.w2[i][None], "2.bias": level.b2[i][None]}
        network.load_state_dict(state)
        x = torch.tensor([*statistics[i].tolist(), 1.2, 1.1, before.scales[i].item()])
        plain.append(abs(network(x).item()))
    sigma = net(statistics, before)
    torch.testing.assert_close(sigma, torch.tensor(plain), rtol=1e-5, atol=1e-7)
    c = math.sqrt(sum(SIZES.tolist()) / sum(d * v * v for d, v in zip(SIZES.tolist(), sigma.tolist(), strict=True)))
    torch.testing.assert_close(normalise(sigma, SIZES), c * sigma.double(), rtol=1e-6, atol=0)


def test_the_paper_form_has_449_weights_a_block_in_pytorchs_range() -> None:
    net = PertNN.paper(NAMES)
    assert sum(parameter.numel() for parameter in net.parameters()) == 449 * len(NAMES)
    (level,) = net.levels
    assert 0.9 * 5**-0.5 < level.w1.abs().max() <= 5**-0.5
    assert 0.9 / 8 < level.w2.abs().max() <= 1 / 8


@given(st.lists(st.floats(1e-3, 1e3), min_size=7, max_size=7))
def test_normalising_keeps_the_expected_squared_length(sigma: list[float]) -> None:
    s = normalise(torch.tensor(sigma, dtype=torch.float64), SIZES)
    assert (SIZES.double() * s**2).sum().item() == pytest.approx(SIZES.sum().item(), rel=1e-12)
    torch.testing.assert_close(s / s[0], torch.tensor(sigma, dtype=torch.float64) / sigma[0], rtol=1e-9, atol=0)


def test_the_gradient_through_the_normaliser_has_a_closed_form() -> None:
    """dL/dsigma_i = c G_i - c m_i sigma_i / S sum_k sigma_k G_k; without the second term when k is detached."""
    sigma = torch.rand(7, dtype=torch.float64).add(0.5).requires_grad_()
    g = torch.randn(7, dtype=torch.float64)
    m, value = SIZES.double(), sigma.detach()
    total = (m * value**2).sum()
    c = (m.sum() / total).sqrt()
    normalise(sigma, SIZES).backward(g)
    torch.testing.assert_close(sigma.grad, c * g - c * m * value / total * (value @ g))
    sigma.grad = None
    normalise(sigma, SIZES, detach=True).backward(g)
    torch.testing.assert_close(sigma.grad, c * g)


@pytest.mark.parametrize("granularity", ["block", "layer", "kind"])
def test_blocks_of_a_group_share_one_network(granularity: str) -> None:
    net = PertNN(NAMES, levels=(granularity,))  # type: ignore[arg-type]
    with torch.no_grad():
        net.levels[0].b2.copy_(torch.arange(1.0, 1 + len(net.levels[0].groups)))
    statistics, before = some_state()
    sigma = net(statistics, before).log()
    groups = [group_of(name, granularity) for name in NAMES]  # type: ignore[arg-type]
    assert len(set(groups)) == {"block": 7, "layer": 4, "kind": 3}[granularity]
    for i, group in enumerate(groups):
        assert sigma[i].item() == pytest.approx(1 + list(dict.fromkeys(groups)).index(group), rel=1e-6)


def test_levels_add_up_and_strength_tempers() -> None:
    net = PertNN(NAMES, levels=("kind", "block"))
    statistics, before = some_state()
    with torch.no_grad():
        net.levels[0].b2.fill_(0.5)
        net.levels[1].b2[2] = 0.25
    full = net(statistics, before).log()
    assert full[2].item() == pytest.approx(0.75) and full[3].item() == pytest.approx(0.5)
    net.strength = 0.5
    torch.testing.assert_close(net(statistics, before).log(), full / 2)


def test_gradients_reach_every_level_and_no_input() -> None:
    net = PertNN(NAMES)
    statistics, before = some_state()
    statistics.requires_grad_()
    net(statistics, before).sum().backward()
    assert statistics.grad is None
    assert all(level.w2.grad.abs().sum() > 0 and level.b2.grad.abs().sum() > 0 for level in net.levels)


def test_inputs_tell_the_two_losses_apart() -> None:
    """Raw, losses of 1.2 and 1.21 are nearly one number; scaled, their difference is a number of order one."""
    statistics, before = some_state()
    other = Recurrent(before.loss_pos, before.loss_neg + 0.01, before.scales)
    assert (inputs_raw(statistics, other) - inputs_raw(statistics, before)).abs().max() < 0.011
    assert (inputs_scaled(statistics, other) - inputs_scaled(statistics, before)).abs().max() > 0.05


def test_the_initialisation_is_a_function_of_the_seed() -> None:
    first, again, other = PertNN.paper(NAMES, 1), PertNN.paper(NAMES, 1), PertNN.paper(NAMES, 2)
    assert torch.equal(first.levels[0].w1, again.levels[0].w1)
    assert not torch.equal(first.levels[0].w1, other.levels[0].w1)
