"""Perturbed reads equal perturbation in place, in every architecture; the stored weights never change."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional

from tests.conftest import FAMILIES, MASKED
from zoft.errors import ModelError
from zoft.metatrain.rounding import RoundedWeights
from zoft.noise.direction import NoiseDirection
from zoft.noise.table import noise_table
from zoft.optim import MeZO
from zoft.weights.blocks import Block, trainable_blocks
from zoft.weights.coverage import verify_coverage
from zoft.weights.perturbed import SLICE, PerturbedWeights
from zoft.weights.vectors import install_fp32_vectors

IDS = torch.arange(3, 27).view(2, 12)


def in_place(model: torch.nn.Module, direction: NoiseDirection, eps: float) -> torch.nn.Module:
    """A copy of ``model`` whose stored weights are perturbed."""
    moved = copy.deepcopy(model)
    for block in trainable_blocks(moved):
        direction.perturb(block, 0, block.size, eps, block.parameter.detach().view(-1))
    return moved


@pytest.mark.parametrize(
    ("family", "tied"),
    # An untied masked model has a bias that nothing reads.
    [(family, tied) for family in FAMILIES + MASKED for tied in (True, False) if tied or family in FAMILIES],
)
@torch.no_grad()
def test_equals_perturbing_in_place(family: str, tied: bool, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("zoft.weights.perturbed.SLICE", {"cpu": 1000})  # slices of 31 rows: several in every layer
    model = tiny_model(family, tie_word_embeddings=tied)
    direction = NoiseDirection(
        0, 5, scales={block.name: 0.5 + i % 3 for i, block in enumerate(trainable_blocks(model))}
    )
    with PerturbedWeights(trainable_blocks(model), direction, 1e-2) as mode:
        on_use = model(IDS).logits
    expected = in_place(model, direction, 1e-2)(IDS).logits
    torch.testing.assert_close(on_use, expected, rtol=1e-5, atol=1e-6)
    assert (model(IDS).logits - expected).abs().max() > 1e-3
    assert mode.used == {block.name for block in trainable_blocks(model)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES + MASKED)
@torch.no_grad()
def test_half_precision_with_fp32_vectors(family: str, dtype: torch.dtype, tiny_model) -> None:
    model = tiny_model(family, dtype=dtype)
    install_fp32_vectors(model)
    direction = NoiseDirection(0, 5, table_dtype=dtype)
    with PerturbedWeights(trainable_blocks(model), direction, 1e-2):
        on_use = model(IDS).logits
    assert on_use.dtype == dtype
    torch.testing.assert_close(on_use, in_place(model, direction, 1e-2)(IDS).logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_product_in_slices_is_computed_in_the_precision_of_autocast(bias: bool, monkeypatch) -> None:
    monkeypatch.setitem(SLICE, "cpu", 1000)
    layer = torch.nn.Linear(32, 100, bias=bias)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with PerturbedWeights(trainable_blocks(layer), NoiseDirection(0, 5), 1e-1):
            on_use = layer(x)
        expected = in_place(layer, NoiseDirection(0, 5), 1e-1)(x)
    assert on_use.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(on_use, expected, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_a_context_is_freed_without_the_garbage_collector(tiny_model) -> None:
    """Its buffers are a layer large, and two forward passes a step would leave them behind."""
    model = tiny_model("llama")
    context = PerturbedWeights(trainable_blocks(model), NoiseDirection(0, 0), 1e-2)
    freed = weakref.ref(context)
    gc.collect()
    gc.disable()
    try:
        with context:
            model(IDS)
        del context
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_perturbations_leave_the_weights_as_they_were(dtype: torch.dtype, tiny_model) -> None:
    model = tiny_model("llama", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = trainable_blocks(model)
    with torch.no_grad():
        for step in range(500):
            for eps in (1e-3, -1e-3):
                with PerturbedWeights(blocks, NoiseDirection(0, step, table_dtype=dtype), eps):
                    model(IDS[:, :2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_exception_in_the_middle_leaves_nothing_behind(tiny_model) -> None:
    model = tiny_model("llama")
    before = model(IDS).logits
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), PerturbedWeights(trainable_blocks(model), NoiseDirection(0, 0), 1e-2):
        model(IDS)
    handle.remove()
    assert torch.equal(model(IDS).logits, before)


class Outsider(torch.nn.Module):
    """Reads its weights in every unusual way: by another module, twice, as a view, in a list, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.shared = torch.nn.Linear(6, 6)
        self.experts = torch.nn.Parameter(torch.randn(2, 6, 6))
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.shared(functional.embedding(input=ids, weight=self.embedding.weight)))
        x = torch.cat([x @ self.experts[0], x @ self.experts.view(2, 6, 6)[1].T], dim=-1)
        x = x * torch.stack([self.gain, self.gain]).mean() * self.gain.item()
        return functional.linear(x[..., :6], self.embedding.weight.data) + functional.linear(
            input=x[..., 6:], weight=self.embedding.weight
        )


@torch.no_grad()
def test_weights_read_outside_their_module() -> None:
    torch.manual_seed(0)
    model, ids, direction = Outsider(), torch.tensor([[1, 10, 3]]), NoiseDirection(2, 2)
    with PerturbedWeights(trainable_blocks(model), direction, 0.1):
        on_use = model(ids)
    torch.testing.assert_close(on_use, in_place(model, direction, 0.1)(ids))


def test_frozen_weights_are_left_alone(tiny_model) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with PerturbedWeights(trainable_blocks(model), NoiseDirection(0, 0), 1e-2) as mode:
        model(IDS)
    assert mode.used == {"lm_head.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_accepts_every_family_and_moves_nothing(dtype: torch.dtype, tiny_model) -> None:
    for family in FAMILIES + MASKED:
        model = tiny_model(family, dtype=dtype)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert verify_coverage(trainable_blocks(model), lambda model=model: model(IDS, labels=IDS).loss) is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_verify_finds_a_weight_read_behind_torchs_back() -> None:
    weight = torch.nn.Parameter(torch.full((3,), 1.5))
    hidden = weight.detach().numpy()  # shares the memory, so only an in-place perturbation reaches it
    with pytest.raises(ModelError, match=r"cannot perturb.*never read: weight"):
        verify_coverage([Block("weight", weight)], lambda: float(hidden.sum()))


def test_verify_sees_blocks_that_start_at_zero() -> None:
    """As B of LoRA does: neither it nor A, which it multiplies, would change the loss."""
    a, b = torch.nn.Parameter(torch.full((3,), 1.5)), torch.nn.Parameter(torch.zeros(3))
    blocks, hidden = [Block("a", a), Block("b", b)], a.detach().numpy()
    assert verify_coverage(blocks, lambda: float((a * b).sum())) is None
    with pytest.raises(ModelError, match=r"cannot perturb.*never read: a"):
        verify_coverage(blocks, lambda: float((b * torch.from_numpy(hidden).clone()).sum()))
    assert torch.equal(b.detach(), torch.zeros(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_allows_for_half_precision_of_autocast(family: str, tiny_model) -> None:
    """On use the weights are rounded to the nearest, in place by the draw: the losses differ by that."""
    model = tiny_model(family)
    blocks = trainable_blocks(model)
    with torch.no_grad():
        for block in blocks:
            block.parameter.mul_(8 if len(block.shape) > 1 else 1)  # logits far apart

    def loss() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return float(model(IDS, labels=IDS).loss)

    with RoundedWeights(blocks, seed=0):
        assert verify_coverage(blocks, loss) is None
    hidden = blocks[0].parameter.detach().numpy()
    with pytest.raises(ModelError, match="cannot perturb"):
        verify_coverage(blocks, lambda: loss() + 1000 * float(hidden.flat[-1]))


def test_verify_warns_of_a_random_objective() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    noise = iter(torch.arange(10.0))
    warning = verify_coverage([Block("weight", weight)], lambda: float(weight.sum() + next(noise)))
    assert warning is not None and "not deterministic" in warning


def test_verify_restores_after_an_exception(tiny_model) -> None:
    model = tiny_model("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = iter([0.0])
    with pytest.raises(StopIteration):
        verify_coverage(trainable_blocks(model), lambda: next(calls))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_perturbed_head_takes_the_memory_of_one_slice(monkeypatch) -> None:
    """The last positions of a batch are not contiguous: torch would copy the weights for each of them."""
    monkeypatch.setitem(SLICE, "cpu", 2**16)
    monkeypatch.setattr("zoft.weights.products.lacks_instructions", lambda dtype: False)  # which would widen the slice
    head = torch.nn.Linear(256, 1024, bias=False).to(torch.bfloat16)
    hidden = torch.randn(16, 3, 256).to(torch.bfloat16)
    noise_table(0, torch.bfloat16, torch.device("cpu"))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.no_grad(),
        PerturbedWeights(trainable_blocks(head), NoiseDirection(0, 0, table_dtype=torch.bfloat16), 1e-3),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        head(hidden[:, -1:])
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 2**16 * 2 <= largest < 2 * 2**16 * 2


def test_a_compiled_model_is_perturbed_too(tiny_model) -> None:
    plain = tiny_model("llama")
    compiled = torch.compile(plain, backend="eager")  # traces the model as every backend does, and needs no compiler
    records = [
        MeZO(model, lr=1e-3, eps=1e-2).measure(lambda model=model: model(IDS, labels=IDS, use_cache=False).loss)
        for model in (compiled, plain)
    ]
    assert records[0] == records[1]
    assert records[0].losses[0][0] != records[0].losses[0][1]
