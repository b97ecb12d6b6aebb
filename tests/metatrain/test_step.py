"""A meta-training step: the teacher's path is Adam's, the tuner's gradient is autograd's, and the tuner learns."""

import copy

import pytest
import torch
from torch.func import functional_call

from tests.metatrain.conftest import IDS, next_token_loss
from zoft.blocks import Block, statistics, trainable_blocks
from zoft.metatrain.step import MetaStepper
from zoft.metatrain.teacher import AdamTeacher, SGDTeacher
from zoft.noise import Direction
from zoft.pertnn import PertNN, Recurrent, normalise


def names_of(model: torch.nn.Module) -> list[str]:
    return [block.name for block in trainable_blocks(model)]


def random_tuner(model: torch.nn.Module) -> PertNN:
    """A tuner in float64 whose scales differ from block to block."""
    net = PertNN(names_of(model)).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for level in net.levels:
            level.w2.normal_(std=0.05, generator=generator)
    return net


TEACHERS = {
    "adam": (AdamTeacher, lambda parameters: torch.optim.Adam(parameters, lr=1e-3)),
    "sgd": (SGDTeacher, lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.8)),
}


@pytest.mark.parametrize(("teacher", "directions"), [("adam", 1), ("adam", 3), ("sgd", 1)])
def test_the_teacher_walks_the_path_of_torchs_optimizer(teacher: str, directions: int, tiny_model) -> None:
    """Probing and walking on the way leave the trajectory where torch has it, up to rounding."""
    make_teacher, make_reference = TEACHERS[teacher]
    model, plain = tiny_model("qwen2", torch.float64), tiny_model("qwen2", torch.float64)
    blocks = trainable_blocks(model)
    walker = make_teacher(blocks, lr=1e-3)
    stepper = MetaStepper(blocks, random_tuner(model), walker, lr=1e-5, directions=directions)
    reference = make_reference(plain.parameters())
    for _ in range(4):
        stepper.step(lambda: next_token_loss(model(IDS).logits))
        reference.zero_grad()
        next_token_loss(plain(IDS).logits).backward()
        reference.step()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-10)
        assert parameter.grad is None


def test_the_tuners_gradient_is_autograds(tiny_model) -> None:
    """Through networks, normaliser and step: theta_1(omega) = theta_0 - lr <g0, u> u, with the noise held in full."""
    model = tiny_model("gpt_neox", torch.float64)
    blocks, net, lr = trainable_blocks(model), random_tuner(model), 1e-4
    sizes = torch.tensor([block.size for block in blocks], dtype=torch.float64)
    z = [Direction(0, 0).values(block).double() for block in blocks]
    g0 = torch.autograd.grad(next_token_loss(model(IDS).logits), [block.parameter for block in blocks])
    twin = copy.deepcopy(net)
    s = normalise(twin(statistics(blocks), Recurrent.start(len(blocks))), sizes)
    slope = sum(s[i] * (g * noise).sum() for i, (g, noise) in enumerate(zip(g0, z, strict=True)))
    moved = {block.name: block.parameter.detach() - lr * slope * s[i] * z[i] for i, block in enumerate(blocks)}
    next_token_loss(functional_call(model, moved, (IDS,), tie_weights=True).logits).backward()

    stepper = MetaStepper(blocks, net, AdamTeacher(blocks, lr=0.0), lr=lr, eps=1e-5, estimator="exact")
    stepper.step(lambda: next_token_loss(model(IDS).logits))
    for parameter, expected in zip(net.parameters(), twin.parameters(), strict=True):
        # the scales are rounded to float32 before use, as in deployment, and the slope is a two-point one
        assert (parameter.grad - expected.grad).norm() < 1e-5 * expected.grad.norm()


def test_the_gain_is_what_the_step_gains(tiny_model) -> None:
    model = tiny_model("gpt_neox", torch.float64)
    blocks = trainable_blocks(model)
    start = copy.deepcopy(model)
    stepper = MetaStepper(blocks, random_tuner(model), AdamTeacher(blocks, lr=0.0), lr=1e-4)
    point = stepper.step(lambda: next_token_loss(model(IDS).logits))
    u = Direction(0, 0, scales=dict(zip(names_of(model), point.scales.tolist(), strict=True)))
    with torch.no_grad():
        for block in trainable_blocks(start):
            block.parameter.sub_(1e-4 * point.slopes[0] * u.values(block).double())
        assert float(next_token_loss(start(IDS).logits)) == pytest.approx(point.losses_after[0], rel=1e-9)
    assert point.gain > 0


def test_a_reset_forgets_moments_losses_and_scales(tiny_model) -> None:
    model = tiny_model("llama")
    blocks = trainable_blocks(model)
    stepper = MetaStepper(blocks, PertNN(names_of(model)), AdamTeacher(blocks, lr=1e-3), lr=1e-5)
    start = copy.deepcopy(model.state_dict())
    first = stepper.step(lambda: next_token_loss(model(IDS).logits))
    after_one = copy.deepcopy(model.state_dict())
    stepper.reset()
    model.load_state_dict(start)
    stepper.step_number = 0
    assert stepper.step(lambda: next_token_loss(model(IDS).logits)).losses_after == first.losses_after
    assert all(torch.equal(tensor, after_one[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("estimator", ["control_variate", "exact"])
def test_the_tuner_learns_which_block_is_worth_shaking(estimator: str) -> None:
    """Two blocks of equal size, only the first moves the loss: in the end it alone is shaken, with s = sqrt(2)."""
    useful, useless = (torch.nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2))
    blocks = [Block("useful", useful), Block("useless", useless)]
    net = PertNN(["useful", "useless"], levels=("block",))
    teacher = AdamTeacher(blocks, lr=0.0)  # stays at one point
    stepper = MetaStepper(blocks, net, teacher, lr=1e-3, directions=4, estimator=estimator)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        point = stepper.step(lambda: (useful - 1).square().mean() * 10 + 0 * useless.sum())
        optimizer.step()
    assert point.scales.tolist() == pytest.approx([2**0.5, 0.0], abs=1e-3)
