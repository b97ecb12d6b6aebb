"""Widened products: float32 results rounded once, in every function and architecture; never a whole weight widened."""

import copy
import inspect
from collections.abc import Callable
from types import MappingProxyType

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import FAMILIES, MASKED
from zoft.noise.direction import NoiseDirection
from zoft.weights import products
from zoft.weights.blocks import trainable_blocks
from zoft.weights.coverage import verify_coverage
from zoft.weights.perturbed import PerturbedWeights
from zoft.weights.reading import runs_in
from zoft.weights.vectors import install_fp32_vectors

HALVES = (torch.bfloat16, torch.float16)
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for half precision, and slices of a few rows."""
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype: dtype in HALVES)
    monkeypatch.setattr(products, "SLICE", 1000)


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


# A product as torch's functions compute it, by x (2, 5, 64), w (70, 64) and b (70,); in float64 they are exact enough.
PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda x, w, b: functional.linear(x, w),
    "linear with a bias": lambda x, w, b: functional.linear(x, w, b),
    "matmul": lambda x, w, b: torch.matmul(x, w.T),
    "Tensor.matmul": lambda x, w, b: x.matmul(w.T),
    "@": lambda x, w, b: x @ w.T,
    "mm": lambda x, w, b: torch.mm(x[0], w.T),
    "mm to a tensor": lambda x, w, b: torch.mm(x[0], w.T, out=x.new_empty(5, 70)),
    "Tensor.mm": lambda x, w, b: x[0].mm(w.T),
    "addmm": lambda x, w, b: torch.addmm(b, x[0], w.T, beta=0.5, alpha=2),
    "Tensor.addmm": lambda x, w, b: b.addmm(x[0], w.T),
    "bmm": lambda x, w, b: torch.bmm(x, w.T.expand(2, 64, 70)),
    "Tensor.bmm": lambda x, w, b: x.bmm(w.T.expand(2, 64, 70)),
}


class Widest(TorchDispatchMode):
    """Notes the most float32 numbers that an operation makes of half-precision ones."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.float32 and args[0].dtype in HALVES:
            self.numbers = max(self.numbers, found.numel())
        return found


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_rounded_once(name: str, dtype: torch.dtype, slow: None) -> None:
    given = [drawn(*shape, dtype=dtype) for shape in ((2, 5, 64), (70, 64), (70,))]
    with products.WidenedProducts(), Widest() as widest:
        found = PRODUCTS[name](*given)
    assert widest.numbers
    exact = PRODUCTS[name](*(tensor.double() for tensor in given))
    assert found.dtype == dtype
    # Half a step of rounding, and what float32 sums are off by.
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()


@torch.no_grad()
def test_weights_are_widened_in_slices(slow: None, tiny_model) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    products.install(model)
    with Widest() as widest, PerturbedWeights(trainable_blocks(model), NoiseDirection(0, 0), 1e-2):
        model(IDS[:1, :2])
    assert 0 < widest.numbers <= 1000 < max(block.size for block in trainable_blocks(model))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES + MASKED)
@torch.no_grad()
def test_models(family: str, dtype: torch.dtype, slow: None, tiny_model, monkeypatch) -> None:
    """Bare and perturbed, a model is nearer to its float32 twin than a step of rounding or two takes it."""
    monkeypatch.setattr("zoft.weights.perturbed.SLICE", {"cpu": 1000})
    model = tiny_model(family, dtype=dtype)
    twin = copy.deepcopy(model).float()
    name, parameters = type(model).__name__, inspected(model)
    install_fp32_vectors(model)
    products.install(model)
    assert (type(model).__name__, inspected(model)) == (name, parameters)
    assert verify_coverage(trainable_blocks(model), lambda: float(model(IDS).logits.float().square().mean())) is None
    direction = NoiseDirection(0, 5)
    with PerturbedWeights(trainable_blocks(model), direction, 1e-2):
        perturbed = model(IDS).logits
    with PerturbedWeights(trainable_blocks(twin), direction, 1e-2):
        expected = twin(IDS).logits
    torch.testing.assert_close(perturbed.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(model(IDS).logits.float(), twin(IDS).logits, rtol=0.02, atol=0.02)


def inspected(model: torch.nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def test_weights_that_are_sent_to_a_device_are_not_widened(slow: None) -> None:
    far, here = torch.empty(5, 64, dtype=torch.bfloat16, device="meta"), drawn(70, 64, dtype=torch.bfloat16)
    assert not products.is_widened([far, here]) and products.is_widened([here, here])


def test_gradients_are_left_to_torch(slow: None) -> None:
    x, w = drawn(5, 64, dtype=torch.bfloat16), drawn(70, 64, dtype=torch.bfloat16).requires_grad_()
    with products.WidenedProducts():
        functional.linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(70, 64), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("has", "slow_ones"),
    [
        ({"architecture": "x86_64", "avx2": True}, HALVES),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, (torch.float16,)),
        ({"architecture": "x86_64", "avx512_bf16": True, "avx512_fp16": True}, ()),
        ({"architecture": "x86_64", "amx_bf16": True, "amx_fp16": False}, (torch.float16,)),
        ({"architecture": "aarch64", "neon": True}, ()),
    ],
)
def test_what_a_cpu_lacks(has: dict[str, object], slow_ones: tuple[torch.dtype, ...], monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(has), raising=False)
    asked = products.lacks_instructions.__wrapped__
    assert tuple(dtype for dtype in HALVES if asked(dtype)) == slow_ones
    assert not asked(torch.float32)


def test_only_such_models_are_changed(tiny_model, slow: None) -> None:
    model = tiny_model("llama")
    products.install(model)
    assert not runs_in(model, products.WidenedProducts)
