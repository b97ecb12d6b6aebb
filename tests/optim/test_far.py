"""A step on a device that is not there: what it would wait for, and where its tensors are.

Fake tensors on the meta device have no numbers, so that reading one is an error, and they refuse to be mixed with
tensors in host memory; the dispatcher sees every copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import FAMILIES
from tests.tasks import conftest
from tests.tasks.conftest import make_task
from tests.tasks.test_losses import EXAMPLES
from zoft.noise.rounding import dither_table
from zoft.noise.table import noise_table
from zoft.optim import MeZO, ZOFineTuner
from zoft.optim.core import parts
from zoft.optim.methods.zo_finetuner import REFRESH, LearnedScales
from zoft.tasks.losses import TrainingLoss, losses_of, value
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import Block, statistics, trainable_blocks
from zoft.weights.vectors import install_fp32_vectors

encode, one_thread = conftest.encode, conftest.one_thread  # fixtures

FAR = torch.device("meta")
SETTINGS = {"lr": 1e-3, "eps": 1e-3}


class Copies(TorchDispatchMode):
    """Counts copies from host memory to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        copying = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if copying and isinstance(source, torch.Tensor) and source.device != FAR == out.device:
            self.count += 1
        return out


@contextmanager
def far_away() -> Iterator[Copies]:
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies, torch.no_grad():
        yield copies


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers were read at once, each time; they are made up."""
    found: list[int] = []

    def read(values: list[torch.Tensor]) -> list[float]:
        assert all(value.device == FAR for value in values)
        found.append(len(values))
        return [1.0 + 0.25 * i for i in range(len(values))]

    monkeypatch.setattr(parts, "read", read)
    return found


def far(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """``model`` on the device, and the tables that a run makes before its first step."""
    if dtype != torch.float32:
        install_fp32_vectors(model)
    noise_table(0, dtype, FAR)
    dither_table(0, FAR)
    return model.to(FAR)


def closure_of(model: torch.nn.Module, encoded: Any, kind: str, count: int = 1) -> Callable[[], torch.Tensor]:
    objective = TrainingLoss(make_task(kind), 0)
    return lambda: value(losses_of(objective, model, encoded, count))


def on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with real numbers: it works in host memory alone, whatever device the model is on."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("kind", ["classification", "choice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_once_for_its_losses(family, dtype, kind, tiny_model, encode, reads) -> None:
    """A copy of the batch and one of the embedding's places per evaluation, however many probes and micro-batches."""
    model = far(tiny_model(family, dtype=dtype), dtype)
    optimizer = MeZO(model, probes=2, weight_decay=0.1, **SETTINGS)
    optimizer._verified = True
    with far_away() as copies:
        record = optimizer.measure(closure_of(model, encode(kind, EXAMPLES), kind, 2))
        assert reads == [4] and record.losses == ((1.0, 1.25), (1.5, 1.75))
        measured = copies.count
        optimizer.apply(record)
    embeddings = sum(isinstance(module, torch.nn.Embedding) for module in model.modules())
    assert measured == 4 * 2 * (1 + embeddings)
    assert copies.count == measured


def test_a_tuner_waits_for_its_statistics_alone(tiny_model, encode, reads, monkeypatch) -> None:
    model = far(tiny_model("llama", dtype=torch.bfloat16), torch.bfloat16)
    blocks = trainable_blocks(model)
    optimizer = ZOFineTuner(model, PertNN([block.name for block in blocks]), **SETTINGS)
    optimizer._verified = True
    fetched: list[int] = []

    def fetch(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        assert all(tensor.device == FAR for tensor in tensors)
        fetched.append(len(tensors))
        return [torch.ones(tensor.shape, dtype=torch.float64) for tensor in tensors]

    def read_statistics(blocks: list[Block]) -> torch.Tensor:
        statistics(blocks)
        return on_host(torch.ones)(len(blocks), 2, dtype=torch.float64)

    measured = LearnedScales.measure

    def measure(scales: LearnedScales, host: ZOFineTuner) -> Any:
        scales.before(host, host.step_number)
        return on_host(measured)(scales, host)

    monkeypatch.setattr("zoft.weights.blocks.fetch", fetch)
    monkeypatch.setattr("zoft.optim.methods.zo_finetuner.statistics", read_statistics)
    monkeypatch.setattr(LearnedScales, "measure", measure)
    monkeypatch.setattr(optimizer, "observe", on_host(optimizer.observe))
    closure = closure_of(model, encode("choice", EXAMPLES), "choice")
    with far_away():
        for _ in range(REFRESH + 1):
            optimizer.apply(optimizer.measure(closure))
    assert reads == [2] * (REFRESH + 1)
    assert fetched == [len(blocks)] * 2


def test_reading_a_number_is_an_error_here(tiny_model, encode) -> None:
    """What the tests above lean on."""
    model = far(tiny_model("llama"), torch.float32)
    with far_away() as copies, pytest.raises(DataDependentOutputException):
        float(closure_of(model, encode("choice", EXAMPLES), "choice")())
    assert copies.count == 1
    with far_away(), pytest.raises(RuntimeError, match="device"):
        model.model.norm.weight + torch.ones(32)
