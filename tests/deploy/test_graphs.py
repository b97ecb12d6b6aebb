"""Graphs without a GPU: what would be captured is written down and called again, operation by operation.

So a value of the host that had slipped into a graph, or a tensor that does not stay where it is, gives wrong losses.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import FAMILIES
from zoft.deploy import FinetuneConfig, StepDone, finetune, graphs
from zoft.deploy.folder import RunFolder
from zoft.deploy.graphs import Ends, SentDirection, check_settings
from zoft.deploy.journal import Contents, HeaderLine, Journal, read_journal
from zoft.errors import ConfigError, Interrupted, ModelError, RunError
from zoft.noise import fused
from zoft.noise.table import NOISE_VERSION, ROW
from zoft.optim import MeZO, ZOFineTuner, ZOOptimizer
from zoft.optim.core import fused_update
from zoft.optim.methods.lezo import Layers
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import trainable_blocks
from zoft.weights.vectors import install_fp32_vectors


class Tape(TorchDispatchMode):
    """Writes down every operation, with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if is_tensor(old) and old.untyped_storage().data_ptr() not in given:  # no view, nothing in place
                    old.copy_(new)


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def perturb(theta, out, table, places, name, span, shape, side):
    """`zoft.noise.fused.perturb` in plain torch."""
    out.copy_(moved(theta, torch.arange(*span), table, places, name, shape, side))
    return out


def perturb_rows(theta, ids, table, places, name, shape, side):
    """`zoft.noise.fused.perturb_rows` in plain torch."""
    at = ids[..., None].long() * shape[0] + torch.arange(shape[0])
    return moved(theta.flatten(), at.flatten(), table, places, name, shape, side).view(*ids.shape, shape[0])


def moved(theta, at, table, places, name, shape, side):
    width, length = shape
    place, stride, step = places.rows[places.first[name] + at // length].unbind(1)
    within = at % length
    z = table[place.long() + within // width * stride + within % width].float()
    return (theta[at].float() + z * (side * step.contiguous().view(torch.float32))).to(theta.dtype)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of calls in every tape that stands in for a graph; the kernels are functions of plain torch."""
    made: list[int] = []

    def captured(function: Callable[[], torch.Tensor], pool: Any) -> Callable[[], torch.Tensor]:
        with Tape() as tape:
            returned = function()
        made.append(len(tape.calls))

        def replay() -> torch.Tensor:
            returned.fill_(torch.nan)
            tape.replay()
            return returned

        return replay

    monkeypatch.setattr(fused, "supports", lambda weights: weights.dtype != torch.float64)
    monkeypatch.setattr(fused, "perturb", perturb)
    monkeypatch.setattr(fused, "perturb_rows", perturb_rows)
    monkeypatch.setattr(fused_update, "serves", lambda *block: False)
    monkeypatch.setattr(graphs, "captured", captured)
    return made


def make(kind: str, model: torch.nn.Module, **settings: Any) -> ZOOptimizer:
    if kind == "zoft":
        names = [block.name for block in trainable_blocks(model)]
        return ZOFineTuner(model, PertNN.fixed(names, torch.linspace(0.5, 2, len(names))), **settings)
    return ZOOptimizer(model, directions=Layers(keep=0.5) if kind == "lezo" else None, **settings)


@pytest.mark.parametrize("kind", ["mezo", "zoft", "lezo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_step_measures_what_an_eager_one_does(family, kind, tiny_model, captures) -> None:
    model = tiny_model(family)
    ids = torch.zeros(2, 6, dtype=torch.long)
    batches = torch.randint(3, 300, (3, 2, 6), generator=torch.Generator().manual_seed(0))
    eager = make(kind, model, lr=1e-3, eps=1e-2, probes=2, seed=3)
    replayed = make(kind, model, lr=1e-3, eps=1e-2, probes=2, seed=3)

    def closure() -> torch.Tensor:
        return model(ids, labels=ids).loss

    ends = Ends(closure, SentDirection(3, eager.table_dtype, eager.blocks))
    for batch in batches:
        ids.copy_(batch)
        expected, found = eager.measure(closure), replayed.measure(ends)
        assert torch.allclose(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-6, atol=0)
        assert found.forwards == expected.forwards == 4
        assert abs(found.losses[0][0] - found.losses[1][1]) > 1e-5
        eager.apply(expected)  # which moves the weights of both
        replayed.observe(expected)
        replayed.step_number += 1
    assert len(captures) == 1


def test_half_precision_with_fp32_vectors(tiny_model, captures) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    install_fp32_vectors(model)
    ids = torch.arange(3, 27).view(2, 12)
    optimizer = MeZO(model, lr=1e-3, eps=1e-2)

    def closure() -> torch.Tensor:
        return model(ids, labels=ids).loss

    ends = Ends(closure, SentDirection(0, optimizer.table_dtype, optimizer.blocks))
    for _ in range(2):
        assert optimizer.measure(ends).losses == optimizer.measure(closure).losses
        ids.add_(3)
    assert len(captures) == 1


def test_weights_that_no_graph_can_perturb_are_reported(captures) -> None:
    with pytest.raises(ModelError, match=r"one CUDA device where Triton works.*found torch.float64 on cpu"):
        SentDirection(0, torch.float64, MeZO([torch.nn.Parameter(torch.zeros(3).double())], lr=1, eps=1).blocks)
    wide = MeZO([("w", torch.nn.Parameter(torch.zeros(1, ROW + 1)))], lr=1, eps=1).blocks
    with pytest.raises(ModelError, match="more than 65536 numbers, as w has"):
        SentDirection(0, torch.float32, wide)
    narrow = MeZO([("w", torch.nn.Parameter(torch.zeros(3)))], lr=1, eps=1).blocks
    with pytest.raises(AssertionError, match="no graph can replay"):
        SentDirection(0, torch.float32, narrow).rows(narrow[0], torch.tensor([0]))


@pytest.fixture
def unchecked(captures, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs with graphs on a CPU, where they are refused."""
    monkeypatch.setattr(importlib.import_module("zoft.deploy.finetune"), "check_settings", lambda *settings: None)
    return captures


@pytest.fixture
def config(model_folder: Path, rows: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model_folder), data=rows, method="mezo", steps=3, lr=1e-3, batch_size=6, eval_every=2, graphs=True,
        out=tmp_path / "run",
    )  # fmt: skip


def losses(out: Path) -> list[float]:
    return [loss for record in read_journal(out / "journal").steps for pair in record.losses for loss in pair]


@pytest.mark.parametrize("changes", [{"accumulate": 2, "probes": 2}, {"dtype": "bf16"}])
def test_a_run_with_graphs_is_one_without(config: FinetuneConfig, tmp_path: Path, changes, unchecked) -> None:
    config = FinetuneConfig.model_validate(config.model_dump() | changes)
    eager = config.model_copy(update={"graphs": False, "out": tmp_path / "eager"})
    results = [finetune(one) for one in (config, eager)]
    tolerance = 1e-2 if config.dtype == "bf16" else 1e-5
    assert losses(config.out) == pytest.approx(losses(eager.out), abs=tolerance)
    assert results[0].forwards == results[1].forwards
    assert 1 <= len(unchecked) < 3 * 2


def test_interrupted_and_resumed_equals_unbroken(config: FinetuneConfig, tmp_path: Path, unchecked) -> None:
    check_resuming(config, tmp_path)


def check_resuming(config: FinetuneConfig, tmp_path: Path) -> None:
    broken = config.model_copy(update={"out": tmp_path / "broken"})
    taken: list[int] = []
    with pytest.raises(Interrupted):
        finetune(
            broken,
            on_event=lambda event: taken.append(event.step) if isinstance(event, StepDone) else None,
            cancelled=lambda: len(taken) >= 2,
        )
    finetune(broken, resume=True)
    finetune(config)
    assert losses(broken.out) == losses(config.out)
    ends = [read_journal(out / "journal").end for out in (broken.out, config.out)]
    assert ends[0].sha256 == ends[1].sha256


def test_only_the_latest_shapes_are_kept(config: FinetuneConfig, monkeypatch, unchecked) -> None:
    monkeypatch.setattr(graphs, "SHAPES", 1)
    finetune(config.model_copy(update={"batch_size": 5, "accumulate": 2}))
    assert len(unchecked) == 2 * 3  # three and two examples in turn


def test_batches_that_cannot_be_packed_are_measured_eagerly(config: FinetuneConfig, monkeypatch, unchecked) -> None:
    monkeypatch.setattr(importlib.import_module("zoft.tasks.losses"), "packable", lambda model: 0)
    finetune(config)
    assert not unchecked
    assert len(losses(config.out)) == 6


def test_graphs_are_refused_where_there_is_no_gpu_or_another_objective(config: FinetuneConfig) -> None:
    with pytest.raises(ConfigError, match=r"graphs=true .* one GPU, found the device cpu: leave it out"):
        finetune(config.model_copy(update={"device": "cpu"}))
    assert not config.out.joinpath("journal").exists()
    with pytest.raises(ConfigError, match="found a device_map"):
        check_settings(torch.device("cuda"), "auto", "loss")
    with pytest.raises(ConfigError, match='the objective is "accuracy"'):
        check_settings(torch.device("cuda"), None, "accuracy")
    check_settings(torch.device("cuda"), None, "loss")


def test_a_capture_that_fails_or_gives_other_numbers_ends_the_run(monkeypatch) -> None:
    """The calls of `captured` on a stand-in for CUDA: three runs before, one captured, and what a replay returns."""
    cuda, calls = torch.cuda, []
    replaying: list[Callable[[], Any]] = []

    @contextmanager
    def graph(graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        calls.append("capture")
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setattr(graphs, "_side_stream", lambda device: MagicMock())
    for name, value in {"current_device": int, "current_stream": MagicMock(), "stream": nullcontext}.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replaying[-1]()))
    monkeypatch.setattr(cuda, "graph", graph)
    out = torch.zeros(2)

    def function() -> torch.Tensor:
        calls.append("run")
        return out.fill_(1.5)

    replaying.append(lambda: out.fill_(1.5))
    replay = graphs.captured(function, None)
    assert calls == ["run"] * 3 + ["capture", "run"] and torch.equal(replay(), torch.tensor([1.5, 1.5]))
    replaying.append(lambda: out.fill_(0.5))
    with pytest.raises(ModelError, match=r"gives \[0.5, 0.5\], .* one by one \[1.5, 1.5\]; leave graphs=true out"):
        graphs.captured(function, None)

    def waiting() -> torch.Tensor:
        if calls[-1] == "capture":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return function()

    with pytest.raises(ModelError, match=r"CUDA graph \(operation not permitted when stream is capturing\); leave"):
        graphs.captured(waiting, None)


def begun(config: FinetuneConfig, path: Path) -> RunFolder:
    """A run folder whose journal has the header of ``config`` alone; of an older version where graphs is None."""
    folder = RunFolder(path)
    header = HeaderLine(
        base=config.model,
        base_hash="0" * 64,
        config=config.model_dump(mode="json", exclude_none=True),
        lr=1e-4,
        eps=1e-3,
        dtype="float32",
        device="cpu",
        threads=1,
        noise=NOISE_VERSION,
        versions={},
    )
    path.mkdir()
    journal = Journal(folder.journal, Contents())
    journal.append(header)
    journal.close()
    return folder


def test_a_run_goes_on_as_it_began_and_older_ones_began_without(config: FinetuneConfig, tmp_path: Path) -> None:
    for i, (began, goes_on) in enumerate(((True, False), (False, True), (None, True))):
        folder = begun(config.model_copy(update={"graphs": began}), tmp_path / str(i))
        with pytest.raises(RunError, match=f"graphs is {bool(began)} there, {goes_on} here"):
            folder.open(config.model_copy(update={"graphs": goes_on}), resume=True, force=False)
    assert folder.open(config.model_copy(update={"graphs": False}), resume=True, force=False).header is not None


# -- where there is a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mezo", "zoft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_replays_what_it_measures_eagerly(kind, dtype, tiny_model) -> None:
    model = tiny_model("llama", dtype=dtype)
    install_fp32_vectors(model)
    model = model.cuda()
    generator = torch.Generator().manual_seed(0)
    eager, replayed = (make(kind, model, lr=1e-3, eps=1e-2, probes=2, seed=3) for _ in range(2))
    source, pool = SentDirection(3, eager.table_dtype, eager.blocks), torch.cuda.graph_pool_handle()
    shapes = [torch.zeros(shape, dtype=torch.long, device="cuda") for shape in ((2, 6), (3, 9))]
    closures = [lambda ids=ids: model(ids, labels=ids).loss for ids in shapes]
    ends = [Ends(closure, source, pool) for closure in closures]
    for step in (0, 1, 0, 0, 1):  # the graphs share their pool in any order
        ids = shapes[step]
        ids.copy_(torch.randint(3, 300, ids.shape, generator=generator))
        expected, found = eager.measure(closures[step]), replayed.measure(ends[step])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=0, atol=tolerance)
        eager.apply(expected)
        replayed.observe(expected)
        replayed.step_number += 1


@pytest.mark.gpu
def test_a_run_on_a_gpu_resumes_to_the_same_weights(config: FinetuneConfig, tmp_path: Path) -> None:
    check_resuming(config, tmp_path)
    eager = config.model_copy(update={"graphs": False, "out": tmp_path / "eager"})
    finetune(eager)
    assert losses(config.out) == pytest.approx(losses(eager.out), abs=1e-4)
