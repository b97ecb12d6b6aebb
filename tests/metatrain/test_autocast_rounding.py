"""Stochastic rounding for bf16 autocast: small updates of float32 weights change the loss, and gradients are exact."""

from contextlib import nullcontext

import pytest
import torch

from tests.conftest import FAMILIES
from tests.metatrain.conftest import IDS, next_token_loss
from zoft.metatrain.rounding import RoundedWeights, rounded
from zoft.noise.direction import NoiseDirection
from zoft.weights.blocks import trainable_blocks
from zoft.weights.perturbed import PerturbedWeights


def loss_of(model, bf16: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return next_token_loss(model(IDS).logits.float())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_move_below_half_a_bf16_step_reaches_the_loss(family: str, tiny_model) -> None:
    """Matrices of bf16 numbers move up and down the gradient by a quarter of a bf16 step."""
    model = tiny_model(family)
    blocks = [block for block in trainable_blocks(model) if len(block.shape) > 1]
    for block in blocks:
        block.parameter.copy_(block.parameter.bfloat16())
    with torch.enable_grad():
        loss_of(model, bf16=False).backward()
    moves = {
        block.name: block.parameter.abs() * 2.0**-8 / 4 * block.parameter.grad.sign()
        for block in blocks
        if "embed" not in block.name  # of which autocast looks float32 rows up
    }

    def difference(bf16: bool, seeds: int = 0) -> float:
        found = []
        for distance in (1, -2):  # to one side, then to the other
            for block in blocks:
                if block.name in moves:
                    block.parameter.add_(moves[block.name], alpha=distance)
            losses = []
            for seed in range(seeds or 1):
                with RoundedWeights(blocks, seed) if seeds else nullcontext():
                    losses.append(float(loss_of(model, bf16)))
            found.append(sum(losses) / len(losses))
        for block in blocks:
            if block.name in moves:
                block.parameter.copy_((block.parameter + moves[block.name]).bfloat16())
        return found[0] - found[1]

    expected = difference(bf16=False)
    assert abs(difference(bf16=True)) < 0.25 * expected, "autocast alone rounds it away"
    assert difference(bf16=True, seeds=16) == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autocast(family: str, tiny_model) -> None:
    model = tiny_model(family)
    blocks = trainable_blocks(model)
    with torch.no_grad():
        for block in blocks:
            block.parameter.copy_(block.parameter.bfloat16())
    loss_of(model, bf16=True).backward()
    plain = [block.parameter.grad.clone() for block in blocks]
    model.zero_grad()
    with RoundedWeights(blocks, seed=0):
        loss_of(model, bf16=True).backward()
    for block, gradient in zip(blocks, plain, strict=True):
        assert block.parameter.grad.dtype == torch.float32
        assert torch.equal(block.parameter.grad, gradient), block.name


def test_rounding_is_a_function_of_seed_and_block(tiny_model) -> None:
    first, second = [block for block in trainable_blocks(tiny_model()) if len(block.shape) > 1][1:3]
    weight = torch.full(first.shape, 1 + 2.0**-9)
    same = rounded(weight, first, seed=1)
    assert torch.equal(same, rounded(weight, first, seed=1))
    assert not torch.equal(same, rounded(weight, first, seed=2))
    assert same.float().mean().item() == pytest.approx(1 + 2.0**-9, rel=1e-3)
    assert torch.equal(rounded(weight.bfloat16().float(), first, seed=1), weight.bfloat16())
    if first.shape == second.shape:
        assert not torch.equal(same, rounded(weight, second, seed=1))


def test_a_probe_inside_sees_the_perturbed_weights(tiny_model) -> None:
    model = tiny_model()
    blocks = trainable_blocks(model)
    u = NoiseDirection(seed=0, step=0, probe=0)
    with torch.no_grad(), PerturbedWeights(blocks, u, 0.05):
        alone = float(loss_of(model, bf16=True))
    with torch.no_grad(), RoundedWeights(blocks, seed=0), PerturbedWeights(blocks, u, 0.05):
        inside = float(loss_of(model, bf16=True))
    assert inside == alone
