"""The layers that see reads of weights: their order, and the modules that run in them."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoft
from zoft.noise.direction import NoiseDirection
from zoft.weights import products
from zoft.weights.blocks import Block, trainable_blocks
from zoft.weights.perturbed import PerturbedWeights
from zoft.weights.products import WidenedProducts
from zoft.weights.reading import Layer, run_in, runs_in
from zoft.weights.replaced import ReplacedWeights
from zoft.weights.streamed import StreamedWeights
from zoft.weights.vectors import Float32Vectors, install_fp32_vectors

IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name of the layer and id of the argument, for every argument of every function that a layer calls."""
    seen: list[tuple[str, int]] = []
    for layer in (Float32Vectors, WidenedProducts, StreamedWeights, ReplacedWeights):
        raw = inspect.getattr_static(layer, "call")
        plain = (lambda call: lambda self, *rest: call(*rest))(raw.__func__) if isinstance(raw, staticmethod) else raw

        def noted(self: Any, func: Any, args: Any, kwargs: Any, plain: Any = plain, name: str = layer.__name__) -> Any:
            if func.__name__ != "__get__":  # a property, such as the dtype
                seen.extend((name, id(value)) for value in args)
            return plain(self, func, args, kwargs)

        monkeypatch.setattr(layer, "call", noted)
    return seen


@torch.no_grad()
def test_the_order_is_that_of_the_docstring(read: list[tuple[str, int]], tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype: dtype == torch.bfloat16)
    model = tiny_model("llama", torch.bfloat16)
    install_fp32_vectors(model)
    products.install(model)
    with PerturbedWeights(trainable_blocks(model), NoiseDirection(0, 0), 1e-3), StreamedWeights():
        model(IDS)
    order = [name for name, argument in read if argument == id(model.model.norm.weight)]
    assert order == ["Float32Vectors", "WidenedProducts", "StreamedWeights", "ReplacedWeights"]


class _Scaled(ReplacedWeights):
    def __init__(self, blocks: list[Block], scale: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(blocks)
        self._scale = scale

    def replacement(self, block: Block) -> torch.Tensor:
        return self._scale(block.parameter)


def test_of_nested_replacements_the_inner_acts_first() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    blocks = trainable_blocks(layer)
    with torch.no_grad(), _Scaled(blocks, lambda w: w + 1), _Scaled(blocks, lambda w: 3 * w):
        assert layer(torch.ones(1, 1)).item() == 6
    assert type(layer.weight) is torch.nn.Parameter


class _Doubled(Layer):
    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return 2 * func(*args, **kwargs) if func is torch.nn.functional.linear else func(*args, **kwargs)


class _Added(Layer):
    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return 1 + func(*args, **kwargs) if func is torch.nn.functional.linear else func(*args, **kwargs)


def test_a_module_runs_in_several_layers_and_stays_what_it_is() -> None:
    module, x = torch.nn.Linear(3, 3), torch.ones(1, 3)
    plain, name, state = module(x), repr(type(module)), list(module.state_dict())
    for layer in (_Doubled, _Added, _Doubled):
        run_in(module, layer)
    assert runs_in(module, _Doubled) and runs_in(module, _Added) and not runs_in(torch.nn.Linear(3, 3), _Doubled)
    assert torch.equal(module(x), 2 * (1 + plain)) or torch.equal(module(x), 1 + 2 * plain)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert (repr(type(module)), list(module.state_dict())) == (name, state)


def test_torch_functions_are_intercepted_in_one_file() -> None:
    root = Path(zoft.__file__).parent
    found = {str(file.relative_to(root)) for file in root.rglob("*.py") if "__torch_function__" in file.read_text()}
    assert found == {"weights/reading.py"}
