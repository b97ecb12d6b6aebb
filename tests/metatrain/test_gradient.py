"""The hook-based meta-gradient against autograd through a functional step, and the control variate against its mean."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.func import functional_call

from tests.metatrain.conftest import IDS, next_token_loss
from zoft.metatrain.gradient import control_variate, detached_slope, exact, inner_product, products, walk_
from zoft.noise.direction import NoiseDirection
from zoft.weights.blocks import trainable_blocks
from zoft.weights.perturbed import PerturbedWeights

LR = 1e-4  # d is 35,000 here: at 1e-2 the step leaves the region where the loss looks smooth


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return next_token_loss(model(IDS).logits)


def scales_of(model: torch.nn.Module) -> torch.Tensor:
    count = len(trainable_blocks(model))
    return 0.5 + torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def measured(model: torch.nn.Module, scales: torch.Tensor, slope: float | None = None, step: int = 0):
    """``(slope, s0, s1, squared norms)`` as meta-training takes them; ``slope=None`` is the exact one."""
    blocks = trainable_blocks(model)
    z = NoiseDirection(0, step)
    u = NoiseDirection(0, step, scales=dict(zip((block.name for block in blocks), scales.tolist(), strict=True)))
    with products(blocks, [z]) as at_start:
        loss_of(model).backward()
    used = float(scales @ at_start.with_noise[0]) if slope is None else slope
    walk_(blocks, u, -LR * used)
    with products(blocks, [z]) as after:
        loss_of(model).backward()
    walk_(blocks, u, LR * used)
    return used, at_start.with_noise[0], after.with_noise[0], at_start.squared_norms


def autograd_gradient(model: torch.nn.Module, scales: torch.Tensor) -> torch.Tensor:
    """dL(theta_1)/ds by autograd through theta_1 = theta_0 - lr <g0, u> u, with the noise held in full."""
    blocks = trainable_blocks(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    z = [NoiseDirection(0, 0).values(block).double() for block in blocks]
    g0 = torch.autograd.grad(loss_of(model), [block.parameter for block in blocks])
    s = scales.clone().requires_grad_()
    slope = sum(s[i] * (g * noise).sum() for i, (g, noise) in enumerate(zip(g0, z, strict=True)))
    moved = {
        names[id(block.parameter)]: block.parameter.detach() - LR * slope * s[i] * z[i]
        for i, block in enumerate(blocks)
    }
    loss = next_token_loss(functional_call(model, moved, (IDS,), tie_weights=True).logits)
    return torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["opt", "gpt_neox"])  # their arithmetic is float64 throughout
def test_equals_autograd_through_a_functional_step(family: str, tied: bool, tiny_model) -> None:
    model = tiny_model(family, torch.float64, tie_word_embeddings=tied)
    scales = scales_of(model)
    slope, s0, s1, _ = measured(model, scales)
    expected = autograd_gradient(model, scales)
    error = (exact(LR, slope, s0, s1, scales) - expected).norm() / expected.norm()
    assert error < 1e-10
    detached = (detached_slope(LR, slope, s1) - expected).norm() / expected.norm()
    assert detached > 0.1  # the detached form leaves about half of it out


def two_point_slope(model: torch.nn.Module, scales: torch.Tensor, eps: float) -> float:
    blocks = trainable_blocks(model)
    u = NoiseDirection(0, 0, scales=dict(zip((block.name for block in blocks), scales.tolist(), strict=True)))
    losses = []
    for signed in (eps, -eps):
        with torch.no_grad(), PerturbedWeights(blocks, u, signed):
            losses.append(float(loss_of(model)))
    return (losses[0] - losses[1]) / (2 * eps)


def test_the_error_of_a_two_point_slope_falls_as_eps_squared(tiny_model) -> None:
    model = tiny_model("gpt_neox", torch.float64)
    scales = scales_of(model)
    expected = autograd_gradient(model, scales)
    errors = []
    for eps in (2e-4, 1e-4, 5e-5):
        slope, s0, s1, _ = measured(model, scales, two_point_slope(model, scales, eps))
        errors.append(float((exact(LR, slope, s0, s1, scales) - expected).norm()))
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(4, rel=0.1)


def test_the_control_variate_keeps_the_mean_and_lowers_the_spread(tiny_model) -> None:
    """Over 200 draws of z."""
    model = tiny_model("opt", torch.float64)
    scales = scales_of(model)
    draws: dict[Callable, list[torch.Tensor]] = {exact: [], control_variate: []}
    for step in range(200):
        slope, s0, s1, norms = measured(model, scales, step=step)
        draws[exact].append(exact(LR, slope, s0, s1, scales))
        draws[control_variate].append(control_variate(LR, s0, s1, norms, scales))
    plain, reduced = (torch.stack(rows) for rows in draws.values())
    spread = plain.std(0)
    assert ((plain.mean(0) - reduced.mean(0)).abs() < 5 * spread / 200**0.5).all()
    assert (reduced.std(0) / spread).median() < 0.2


def test_gradients_are_freed_and_walks_come_back(tiny_model) -> None:
    model = tiny_model("llama")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    measured(model, scales_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter, start in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), start, rtol=1e-6, atol=1e-7)


def test_an_inner_product_is_taken_piece_by_piece(tiny_model) -> None:
    block = trainable_blocks(tiny_model("llama", vocab_size=40_000))[0]  # three chunks
    z = NoiseDirection(3, 1)
    flat = torch.randn(block.size, generator=torch.Generator().manual_seed(0))
    expected = float(flat.double() @ z.values(block).double().view(-1))
    assert inner_product(block, flat, z) == pytest.approx(expected, abs=2e-6 * float(flat.norm()))
    flat = flat.double()
    assert inner_product(block, flat, z) == pytest.approx(float(flat @ z.values(block).double().view(-1)), rel=1e-10)


def test_a_direction_with_scales_is_refused(tiny_model) -> None:
    blocks = trainable_blocks(tiny_model("llama"))
    with pytest.raises(ValueError, match="without scales"), products(blocks, [NoiseDirection(0, 0, scales={"a": 2.0})]):
        pass
