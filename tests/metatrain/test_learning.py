"""What is learned and by what: controls, warm start, the learner's rates, the SGD teacher, the published form."""

import copy

import pytest
import torch

from tests.metatrain.conftest import IDS, next_token_loss
from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.controls import energy_scales, energy_tuner, gradient_energy, random_tuner, warm_start_
from zoft.metatrain.gradient import lr_gradient
from zoft.metatrain.learner import Learner
from zoft.metatrain.step import MetaStepper
from zoft.metatrain.teacher import AdamTeacher
from zoft.noise.direction import NoiseDirection
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import full_sizes, normalise
from zoft.weights.blocks import statistics, trainable_blocks

NAMES = ["layers.0.v.weight", "layers.1.v.weight", "layers.0.norm.weight"]


def config(**changes: object) -> MetatrainConfig:
    return MetatrainConfig(**{"model": "m", "tasks": ("copa",)} | changes)


def test_energy_is_the_mean_squared_gradient_per_weight(tiny_model) -> None:
    model = tiny_model("gpt_neox", torch.float64)
    blocks = trainable_blocks(model)
    batches = [IDS, IDS.flip(1)]
    energy = gradient_energy(blocks, [lambda ids=ids: next_token_loss(model(ids).logits) for ids in batches])
    expected = torch.zeros(len(blocks), dtype=torch.float64)
    for ids in batches:
        gradients = torch.autograd.grad(next_token_loss(model(ids).logits), [block.parameter for block in blocks])
        expected += torch.stack([gradient.square().mean() for gradient in gradients]) / 2
    torch.testing.assert_close(energy, expected, rtol=1e-9, atol=0)


def test_the_energy_control_is_the_fourth_root_normalised(tiny_model) -> None:
    blocks = trainable_blocks(tiny_model("llama"))
    energy = torch.rand(len(blocks), dtype=torch.float64)
    energy[3] = 0  # takes no part in the loss
    sizes = torch.tensor([block.size for block in blocks], dtype=torch.float64)
    s = normalise(energy_tuner(blocks, energy)(statistics(blocks), Recurrent.start(len(blocks))), sizes).detach()
    known = energy > 0
    ratio = s[known] / energy[known] ** 0.25
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
    assert s[3] == pytest.approx(s[known].min().item(), rel=1e-6)


def test_the_random_control_has_scales_far_apart(tiny_model) -> None:
    blocks = trainable_blocks(tiny_model("llama"))
    start = Recurrent.start(len(blocks))
    one, two = (random_tuner(blocks, seed)(statistics(blocks), start).detach() for seed in (0, 1))
    assert (one.std() / one.mean()) > 0.3 and not torch.equal(one, two)


def test_a_warm_start_gives_every_kind_its_mean() -> None:
    net = PertNN(NAMES)
    warm_start_(net, torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64))
    sigma = net(torch.ones(3, 2, dtype=torch.float64), Recurrent.start(3))
    assert sigma.tolist() == pytest.approx([2.0, 2.0, 3.0])


def test_energy_scales_have_mean_square_one_over_the_weights() -> None:
    sizes = torch.tensor([10.0, 1000.0, 5.0], dtype=torch.float64)
    sigma = energy_scales(torch.tensor([1e-2, 1e-6, 1e-3], dtype=torch.float64), sizes)
    assert (sizes * sigma**2).sum() == pytest.approx(sizes.sum().item())


def test_the_learned_rate_moves_towards_where_curvature_is_felt() -> None:
    """On |x|^2 / 2 in d dimensions a step along z gains most at lr = 1 / (d + 2): there E c^2 = lr E c^2 z.z."""
    d, theta = 20, torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)

    def mean(lr: float) -> float:
        total = 0.0
        for _ in range(4000):
            z = torch.randn(d, generator=generator, dtype=torch.float64)
            c = theta @ z
            s0, s1 = c.view(1), ((theta - lr * c * z) @ z).view(1)
            total += lr_gradient(lr, s0, s1, (theta @ theta).view(1), one)
        return total / 4000

    best = 1 / (d + 2)
    assert mean(best / 3) < 0 < mean(best * 3)
    assert abs(mean(best)) < 0.1 * abs(mean(best * 3))


def test_the_published_tuner_learns_at_a_constant_rate_and_ours_at_a_falling_one() -> None:
    for preset, expected in (("paper", [0.1, 0.1]), ("zoft", [0.05, 0.025])):
        learner = Learner(PertNN(NAMES), config(preset=preset))
        rates = []
        for left in (1.0, 0.5):
            learner.zero_grad()
            learner.learn(0.0, left)
            rates.append(learner.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx(expected)


def test_scales_are_pulled_back_and_single_blocks_the_most() -> None:
    """Without a gradient a kind's logarithm falls by lr * pull of itself, a block's by lr * residual_pull."""
    learner = Learner(PertNN(NAMES), config(tuner_lr=0.05, pull=1.0, residual_pull=4.0))
    with torch.no_grad():
        for level in learner.tuner.levels:
            level.b2.fill_(1.0)
    learner.zero_grad()
    learner.learn(0.0)
    kind, block = learner.tuner.levels
    assert kind.b2.tolist() == pytest.approx([0.95, 0.95]) and block.b2.tolist() == pytest.approx([0.8] * 3)


def test_a_warm_start_is_where_the_pull_leads(tmp_path) -> None:
    """Without a gradient the kind stays at its start, and moves back from elsewhere; a snapshot keeps the start."""
    sigma = torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64)
    learner = Learner(PertNN(NAMES), config(tuner_lr=0.05, pull=1.0, residual_pull=4.0))
    learner.start_from(sigma)
    kind, block = learner.tuner.levels
    start = kind.b2.tolist()
    learner.zero_grad()
    learner.learn(0.0)
    assert kind.b2.tolist() == pytest.approx(start) and max(start) > 0.5 and not block.b2.any()
    with torch.no_grad():
        kind.b2 += 1.0
    learner.save(tmp_path / "snapshot", {})
    again = Learner(PertNN(NAMES), config(tuner_lr=0.05, pull=1.0, residual_pull=4.0))
    again.load(tmp_path / "snapshot")
    again.zero_grad()
    again.learn(0.0)
    assert again.tuner.levels[0].b2.tolist() == pytest.approx([value + 0.95 for value in start])


def test_no_scale_runs_away() -> None:
    """A gradient that always says the same moves the logarithm of a scale to 1 / pull and no further."""
    learner = Learner(PertNN(NAMES, levels=("kind",), hidden=1), config(granularity="kind", hidden=1, pull=1.0))
    (level,) = learner.tuner.levels
    for _ in range(300):
        learner.zero_grad()
        level.b2.grad = torch.tensor([-1.0, 1.0])
        learner.learn(0.0)
    assert level.b2.tolist() == pytest.approx([0.95, -0.95], abs=0.01)  # the pull comes after the step of 0.05


def test_the_rate_follows_its_gradient_only_where_it_is_learned() -> None:
    for learn, moved in ((True, 1e-5 * 0.951229), (False, 1e-5)):
        learner = Learner(PertNN(NAMES), config(learn_lr=learn, lr=1e-5))
        learner.zero_grad()
        learner.learn(0.3)
        assert learner.lr == pytest.approx(moved, rel=1e-5)


def test_the_paper_without_its_normaliser_takes_the_raw_scales(tiny_model) -> None:
    model = tiny_model("gpt_neox", torch.float64)
    blocks = trainable_blocks(model)
    net = PertNN.paper([block.name for block in blocks]).double()
    net.effective_size = "none"
    sigma = net(statistics(blocks), Recurrent.start(len(blocks))).detach()
    point = MetaStepper(blocks, net, AdamTeacher(blocks, lr=0.0), lr=1e-4).step(
        lambda: next_token_loss(model(IDS).logits)
    )
    assert torch.equal(point.scales, sigma.float().double())
    assert not torch.allclose(normalise(sigma, full_sizes(blocks)), sigma, rtol=0.1)


def test_scales_are_not_pulled_where_zero_is_not_mezo() -> None:
    """With |MLP| an output of 0 is a block that is never shaken."""
    learner = Learner(PertNN.paper(NAMES), config(preset="paper", tuner_optimizer="adam"))
    (level,) = learner.tuner.levels
    before = level.b2.detach().clone()
    learner.zero_grad()
    learner.learn(0.0)
    assert torch.equal(level.b2, before)


def test_the_published_method_number_for_number(tiny_model) -> None:
    """Three points of methods 5.1 in plain torch: raw inputs, recurrent sigma, detached slope and normaliser, SGD."""
    lr, eps, tuner_lr = 1e-4, 1e-3, 0.1
    model = tiny_model("gpt_neox", torch.float64)
    twin = copy.deepcopy(model)
    blocks = trainable_blocks(model)
    net = PertNN.paper([block.name for block in blocks]).double()
    plain_net = copy.deepcopy(net)
    teacher = AdamTeacher(blocks, lr=1e-3)
    stepper = MetaStepper(blocks, net, teacher, lr=lr, eps=eps, estimator="detached", detach_normaliser=True, seed=5)
    sgd = torch.optim.SGD(net.parameters(), lr=tuner_lr)

    def loss_at(weights: list[torch.Tensor]) -> torch.Tensor:
        for parameter, value in zip(twin.parameters(), weights, strict=True):
            parameter.data = value
        return next_token_loss(twin(IDS).logits)

    theta = [parameter.detach().clone() for parameter in twin.parameters()]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in theta]
    sigma_before, loss_pos, loss_neg = torch.ones(len(blocks), dtype=torch.float64), 0.0, 0.0
    sizes = torch.tensor([block.size for block in blocks], dtype=torch.float64)
    for t in range(3):
        sgd.zero_grad()
        point = stepper.step(lambda: next_token_loss(model(IDS).logits))
        sgd.step()

        rows = torch.stack([torch.stack([v.mean(), v.var(correction=0)]) for v in theta])
        losses = torch.tensor([loss_pos, loss_neg], dtype=torch.float64).expand(len(blocks), 2)
        x = torch.cat([rows, losses, sigma_before[:, None]], 1).float().double()  # the inputs are float32
        (level,) = plain_net.levels
        hidden = torch.tanh(torch.einsum("nhi,ni->nh", level.w1, x) + level.b1)
        sigma = ((level.w2 * hidden).sum(1) + level.b2).abs()
        c = (sizes.sum() / (sizes * sigma.detach() ** 2).sum()).sqrt()
        s = (c * sigma).detach().float().double()
        u = [s[i] * NoiseDirection(5, t, 0).values(block).double() for i, block in enumerate(blocks)]
        with torch.no_grad():
            loss_pos = loss_at([v + eps * w for v, w in zip(theta, u, strict=True)]).item()
            loss_neg = loss_at([v - eps * w for v, w in zip(theta, u, strict=True)]).item()
        slope = (loss_pos - loss_neg) / (2 * eps)
        meta_loss = loss_at([v - lr * slope * w for v, w in zip(theta, u, strict=True)])
        g1 = torch.autograd.grad(meta_loss, list(twin.parameters()))
        # d meta_loss / d sigma_i = c * (-lr p <g1_i, z_i>), through the network alone
        by_sigma = torch.stack(
            [-lr * slope * c * (g * w).sum() / s[i] for i, (g, w) in enumerate(zip(g1, u, strict=True))]
        )
        gradients = torch.autograd.grad(sigma, list(plain_net.parameters()), by_sigma)
        with torch.no_grad():
            for parameter, gradient in zip(plain_net.parameters(), gradients, strict=True):
                parameter.sub_(tuner_lr * gradient)
        sigma_before = sigma.detach()

        assert point.losses_after[0] == pytest.approx(meta_loss.item(), rel=1e-9)
        assert point.slopes[0] == pytest.approx(slope, rel=1e-7)
        for parameter, expected in zip(net.parameters(), plain_net.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-12)

        g0 = torch.autograd.grad(loss_at(theta), list(twin.parameters()))
        for k, (first, second) in enumerate(moments):
            first.mul_(0.9).add_(g0[k], alpha=0.1)
            second.mul_(0.999).addcmul_(g0[k], g0[k], value=0.001)
            corrected = (second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
            theta[k] = theta[k] - 1e-3 / (1 - 0.9 ** (t + 1)) * first / corrected
