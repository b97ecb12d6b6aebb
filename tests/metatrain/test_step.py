"""A meta-training step: the teacher's path is Adam's, the tuner's gradient is autograd's, and the tuner learns."""

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from tests.metatrain.conftest import IDS, next_token_loss
from zoft.errors import ConfigError, ModelError
from zoft.metatrain.activations import checkpoint_activations
from zoft.metatrain.rounding import rounding
from zoft.metatrain.step import MetaStepper
from zoft.metatrain.teacher import Adam8bitTeacher, AdamTeacher, SGDTeacher
from zoft.noise.direction import NoiseDirection
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import normalise
from zoft.weights.blocks import Block, statistics, trainable_blocks


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


@pytest.mark.parametrize(("teacher", "probes"), [("adam", 1), ("adam", 3), ("sgd", 1)])
def test_the_teacher_walks_the_path_of_torchs_optimizer(teacher: str, probes: int, tiny_model) -> None:
    """Probing and walking on the way leave the trajectory where torch has it, up to rounding."""
    make_teacher, make_reference = TEACHERS[teacher]
    model, plain = tiny_model("qwen2", torch.float64), tiny_model("qwen2", torch.float64)
    blocks = trainable_blocks(model)
    walker = make_teacher(blocks, lr=1e-3)
    stepper = MetaStepper(blocks, random_tuner(model), walker, lr=1e-5, probes=probes)
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
    z = [NoiseDirection(0, 0).values(block).double() for block in blocks]
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


OTHER_IDS = IDS.flip(1) + 40


def test_on_a_fresh_batch_the_gradient_is_autograds_too(tiny_model) -> None:
    """L_B(theta_0 - lr <gA, u> u): slope and teacher on one batch, the meta-loss on another."""
    model = tiny_model("gpt_neox", torch.float64)
    blocks, net, lr = trainable_blocks(model), random_tuner(model), 1e-4

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    z = [NoiseDirection(0, 0).values(block).double() for block in blocks]
    g0 = torch.autograd.grad(loss(IDS), [block.parameter for block in blocks])
    stepper = MetaStepper(blocks, net, AdamTeacher(blocks, lr=0.0), lr=lr, eps=1e-5, estimator="exact")
    point = stepper.step(lambda: loss(IDS), fresh=lambda: loss(OTHER_IDS))

    s, log_lr = point.scales.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    slope = sum(s[i] * (g * noise).sum() for i, (g, noise) in enumerate(zip(g0, z, strict=True)))
    step = lr * log_lr.exp() * slope
    moved = {block.name: block.parameter.detach() - step * s[i] * z[i] for i, block in enumerate(blocks)}
    logits = functional_call(model, moved, (OTHER_IDS,), tie_weights=True).logits
    after = functional.cross_entropy(logits[:, :-1].flatten(0, 1), OTHER_IDS[:, 1:].flatten())
    by_s, by_lr = torch.autograd.grad(after, [s, log_lr])
    assert (point.gradient - by_s).norm() < 1e-5 * by_s.norm()
    assert point.lr_gradient == pytest.approx(float(by_lr), rel=1e-5)
    assert point.gain == pytest.approx(float((loss(OTHER_IDS) - after).detach()), rel=1e-5)


def test_a_fresh_batch_rewards_what_batches_have_in_common() -> None:
    """The second block has the larger gradients, and they cancel from batch to batch: on the same batch it wins."""
    ends = {}
    for fresh in (False, True):
        common, peculiar = (torch.nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2))
        blocks = [Block("common", common), Block("peculiar", peculiar)]
        net = PertNN(["common", "peculiar"], levels=("block",))
        stepper = MetaStepper(
            blocks, net, AdamTeacher(blocks, lr=0.0), lr=1e-4, probes=8, estimator="exact", relative=True
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for number in range(60):

            def loss(sign: float, common=common, peculiar=peculiar) -> torch.Tensor:
                return (common - 1).square().mean() + 1.5 * (peculiar - sign).square().mean()

            sign = (-1.0) ** number
            optimizer.zero_grad()
            other = (lambda sign=sign: loss(-sign)) if fresh else None
            point = stepper.step(lambda sign=sign: loss(sign), fresh=other)
            optimizer.step()
        ends[fresh] = point.scales.tolist()
    assert ends[True] == pytest.approx([2**0.5, 0.0], abs=0.05)
    assert ends[False] == pytest.approx([0.0, 2**0.5], abs=0.05)


def test_the_control_variate_refuses_a_fresh_batch(tiny_model) -> None:
    blocks = trainable_blocks(tiny_model("llama"))
    stepper = MetaStepper(blocks, PertNN([block.name for block in blocks]), AdamTeacher(blocks, lr=0.0), lr=1e-4)
    with pytest.raises(ValueError, match="exact or detached"):
        stepper.step(lambda: torch.zeros(()), fresh=lambda: torch.zeros(()))


def test_the_gain_is_what_the_step_gains(tiny_model) -> None:
    model = tiny_model("gpt_neox", torch.float64)
    blocks = trainable_blocks(model)
    start = copy.deepcopy(model)
    stepper = MetaStepper(blocks, random_tuner(model), AdamTeacher(blocks, lr=0.0), lr=1e-4)
    point = stepper.step(lambda: next_token_loss(model(IDS).logits))
    u = NoiseDirection(0, 0, scales=dict(zip(names_of(model), point.scales.tolist(), strict=True)))
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
    stepper = MetaStepper(blocks, net, teacher, lr=1e-3, probes=4, estimator=estimator)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        point = stepper.step(lambda: (useful - 1).square().mean() * 10 + 0 * useless.sum())
        optimizer.step()
    assert point.scales.tolist() == pytest.approx([2**0.5, 0.0], abs=1e-3)


def test_moments_of_a_byte_each_walk_nearly_the_path_of_adam(tiny_model, monkeypatch) -> None:
    """In pieces of two sizes; the teacher keeps no gradient, and a reset forgets the moments."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("zoft.metatrain.teacher._PIECE", 8192)
    ends, walkers = [], []
    for kind in (AdamTeacher, Adam8bitTeacher):
        model = tiny_model("llama", hidden_size=64, intermediate_size=128)
        blocks = trainable_blocks(model)
        start = [block.parameter.detach().clone() for block in blocks]
        walkers.append(kind(blocks, lr=1e-3))
        stepper = MetaStepper(blocks, PertNN(names_of(model)), walkers[-1], lr=1e-5)
        for _ in range(6):
            stepper.step(lambda model=model: next_token_loss(model(IDS).logits))
        assert all(block.parameter.grad is None for block in blocks)
        ends.append([block.parameter.detach() - before for block, before in zip(blocks, start, strict=True)])
    for plain, low in zip(*ends, strict=True):
        assert (low - plain).norm() < 0.1 * plain.norm()
    states = [state for optimizer in walkers[1].optimizers.values() for state in optimizer.state.values()]
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
    bytes_of = sum(state[name].nbytes for state in states for name in ("state1", "state2"))
    assert bytes_of == sum((2 if block.size >= 4096 else 8) * block.size for block in walkers[1].blocks)
    walkers[1].reset()
    assert not walkers[1].optimizers


def test_without_the_library_its_teacher_is_refused(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("zoft.metatrain.teacher.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* pip install 'zoft\[lowbit\]'"):
        Adam8bitTeacher(trainable_blocks(tiny_model("llama")), lr=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_computing_activations_again_changes_no_bit(family: str, dtype: str, tiny_model) -> None:
    points, weights, calls = [], [], []
    for again in (False, True):
        model = tiny_model(family, **({"dropout": 0.5} if family == "opt" else {}))
        blocks = trainable_blocks(model)
        if again:
            checkpoint_activations(model, lambda blocks=blocks: rounding(blocks, dtype, 0))
        counts: list[int] = []
        (layer, *_) = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
        layer.register_forward_hook(lambda *_, counts=counts: counts.append(torch.is_grad_enabled()))

        def closure(model=model) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                return next_token_loss(model(IDS).logits.float())

        stepper = MetaStepper(blocks, PertNN(names_of(model)), AdamTeacher(blocks, lr=1e-3), lr=1e-4)
        with rounding(blocks, dtype, 0):
            points.append([stepper.step(closure) for _ in range(3)])
        weights.append(model.state_dict())
        calls.append(sum(counts))
    for plain, checkpointed in zip(*points, strict=True):
        assert plain.losses_after == checkpointed.losses_after
        assert torch.equal(plain.gradient, checkpointed.gradient)
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert calls == [6, 12]  # two backward passes a point


def test_a_model_that_cannot_compute_activations_again_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no layers"):
        checkpoint_activations(torch.nn.Linear(2, 2))
