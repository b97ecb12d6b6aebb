"""What every method owes, in one table: a new method joins with one row.

Two runs are equal bit for bit; records replay to the same bits, with the tensors of every method in half precision and
tied weights; a run that goes on from a state, or from a snapshot and the records before it, equals an unbroken one; a
quadratic is minimised; forwards are counted as they were taken; and it holds as many numbers as its theory says.
"""

import copy
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from zoft.deploy.journal import Contents, HeaderLine, Journal, ProjectionLine, StepLine, read_journal
from zoft.deploy.snapshots import Snapshots
from zoft.optim import METHODS, FullObjective, LearnedScales, ProjectionRecord, Record, ZOOptimizer, get_method
from zoft.tuner.networks import PertNN
from zoft.weights.vectors import install_fp32_vectors

IDS = torch.arange(3, 27).view(2, 12)


class Row(NamedTuple):
    """``lr`` converges on the quadratic to ``goal`` of its start, in the median of ``seeds`` runs.

    ``options`` bring out the method in a few steps.

    ``state(d, n, projected)``: the numbers held for d weights in n blocks, of which so many are projected.
    """

    lr: float
    options: Mapping[str, Any] = MappingProxyType({})
    steps: int = 400
    eps: float = 1e-2
    probes: int | None = None
    state: Any = lambda d, n, projected: 0
    goal: float = 0.2
    seeds: int = 1


TABLE: dict[str, Row] = {
    "mezo": Row(2e-3),
    "mezo-momentum": Row(2e-3, state=lambda d, n, projected: d),
    "mezo-adam": Row(6e-2, state=lambda d, n, projected: 2 * d),
    "scalar-adam": Row(6e-2, {"beta": 0.9}),
    "zo-sign": Row(3e-2, steps=1200),
    "zo-conservative": Row(2e-3),
    "lezo": Row(4e-3, {"keep": 0.5}),
    "sparse-mezo": Row(4e-3, {"keep": 0.9}, state=lambda d, n, projected: n, goal=0.6),
    "lozo": Row(2e-3, {"rank": 2, "refresh": 5}),
    "lozo-m": Row(6e-3, {"rank": 2, "refresh": 5}, state=None, seeds=7),
    "subzero": Row(2e-3, {"rank": 4, "refresh": 5}),
    "tezo": Row(2e-3, {"rank": 8}, 800),
    "fzoo": Row(2e-2),
    "zo-adamu": Row(2e-3, {"warmup": 3}, 1500, state=lambda d, n, projected: d),
    "hizoo": Row(5e-3, {"alpha": 1e-4}, 800, eps=1e-1, state=lambda d, n, projected: d),
    "mezo-svrg": Row(1e-3, {"full_ratio": 1.0}, 1000, state=lambda d, n, projected: d),
    "zo-dap": Row(2e-3),
    "zo-muon": Row(1e-1, {"rank": 4, "refresh": 5, "vector_ratio": 0.1}),
    "zo-ldsd": Row(1e-3, {"mean_rate": 1e-2}, state=lambda d, n, projected: d),
    "dizo": Row(2e-3, {"cycle": 2, "inner": 2}, state=lambda d, n, projected: projected),
    "dizo-fo": Row(2e-3, {"cycle": 2, "inner": 2}, state=lambda d, n, projected: projected),
    "zoft": Row(2e-3, state=None),
    "lozo+mezo-adam+dizo": Row(3e-2, {"rank": 2, "refresh": 5, "cycle": 2, "inner": 2}, 800, state=None),
    "zoft+zo-dap+mezo-momentum": Row(3e-3, state=None),
}
EVERY = pytest.mark.parametrize("name", TABLE)


def make(name: str, params: Any, closure: Any, steps: int = 8, **settings: Any) -> ZOOptimizer:
    row, method = TABLE[name], get_method(name)
    given = {"lr": row.lr, "eps": row.eps, "probes": row.probes or method.probes, "seed": 5}
    parts = method.make_parts(method.options(row.options), steps=steps)
    tuner: dict[str, Any] = {}
    live = settings.pop("live", True)
    if method.tuned and live:
        names = [name for name, _ in (params.named_parameters() if isinstance(params, torch.nn.Module) else params)]
        net = PertNN(names)
        net.levels[0].b2.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        tuner = {"scales": LearnedScales(tuner=net)}
    return method.optimizer(params, full=FullObjective(closure, 3.5), **given | parts | tuner | settings)


class Run:
    """A model, its optimizer and its records; batches differ from step to step."""

    def __init__(self, name: str, model: torch.nn.Module, **settings: Any) -> None:
        self.model, self.records, self.step = model, [], 0
        self.called = 0
        self.optimizer = make(name, model, self.loss, journal=self.records.append, **settings)

    def loss(self) -> torch.Tensor:
        self.called += 1
        ids = (IDS + self.step) % 300 + 3
        return self.model(ids, labels=ids).loss

    def take(self, steps: int) -> "Run":
        for _ in range(steps):
            self.optimizer.step(self.loss)
            self.step += 1
        return self

    def apply(self, records: list[Record]) -> "Run":
        for record in records:
            self.optimizer.apply(record)
        return self


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.fixture
def half(tiny_model):
    """A half-precision model with tied embeddings and float32 vectors, the same at every call."""

    def tied() -> torch.nn.Module:
        model = tiny_model("qwen2", torch.bfloat16)
        install_fp32_vectors(model)
        return model

    return tied


def test_the_table_has_every_method() -> None:
    """Those that take exact gradients stand in test_exact.py, beside every method of this table."""
    zeroth_order = {name for name, method in METHODS.items() if not (method.first_order or method.exact)}
    assert {name for name in TABLE if "+" not in name} == zeroth_order


@EVERY
def test_runs_are_deterministic_and_replay_bit_for_bit(name: str, half) -> None:
    """Half precision, tied weights, weight decay; the records go through a journal on disk."""
    one, two = (Run(name, half(), weight_decay=0.1).take(7) for _ in range(2))
    assert same(one, two) and one.records == two.records
    assert not same(one, Run(name, half()))
    replayed = Run(name, half(), weight_decay=0.1, live=False, lr=0.0)
    assert same(replayed.apply(through_a_journal(one.records)), one)


@pytest.mark.gpu
@EVERY
def test_a_gpu_replays_the_records_of_a_cpu(name: str, tiny_model) -> None:
    """To the same bits where the update is a product and a sum a number; else within what float32 sums are off by."""
    run, start = Run(name, tiny_model("llama"), weight_decay=0.1).take(7), tiny_model("llama")
    there = Run(name, tiny_model("llama").cuda(), weight_decay=0.1, live=False, lr=0.0).apply(run.records)
    if name in ("mezo", "zoft", "lezo"):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(*(r.model.parameters() for r in (run, there)), strict=True))
    for base, a, b in zip(*(model.parameters() for model in (start, run.model, there.model)), strict=True):
        assert (a - b.cpu()).norm() <= 1e-4 * (a - base).norm() + 1e-7


def through_a_journal(records: list[Record]) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal")
        journal.append(
            HeaderLine(
                base="m", base_hash="0", config={"seed": 5}, lr=1e-3, eps=1, dtype="", device="", threads=1, noise="",
                versions={},
            )
        )  # fmt: skip
        for record in records:
            journal.append(ProjectionLine.of(record) if isinstance(record, ProjectionRecord) else StepLine.of(record))
        journal.close()
        contents = read_journal(journal.path)
    found = list(contents.records(0, len(contents.steps)))
    if any(record.scales for record in contents.steps):
        return found  # float32 in the journal, and in the records
    assert found == records
    return found


@EVERY
@pytest.mark.parametrize("through", ["state_dict", "snapshot"])
def test_a_run_that_goes_on_equals_an_unbroken_one(name: str, through: str, half, tmp_path: Path) -> None:
    unbroken = Run(name, half()).take(8)
    first = Run(name, half()).take(5)
    second = Run(name, half())
    if through == "state_dict":
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    else:
        second.take(1)  # what a used optimizer holds must not stay
        snapshots = Snapshots(tmp_path)
        snapshots.save(5, first.optimizer)
        snapshots.load(5, second.optimizer)
        for record in first.records:
            second.optimizer.observe(record)
        second.records.clear()
    second.step = 5
    second.take(3)
    assert same(second, unbroken)
    assert first.records + second.records[-len(unbroken.records) + len(first.records) :] == unbroken.records


@EVERY
def test_a_quadratic_is_minimised(name: str) -> None:
    row, left = TABLE[name], []
    for seed in range(5, 5 + row.seeds):
        generator = torch.Generator().manual_seed(1)
        shapes = {"layers.0.q_proj.weight": (10, 8), "layers.1.v_proj.weight": (8, 6), "norm.weight": (5,)}
        params = [(n, torch.nn.Parameter(torch.randn(shape, generator=generator))) for n, shape in shapes.items()]

        def loss(params: Any = params) -> torch.Tensor:
            return sum((p.double() ** 2).sum() for _, p in params)  # type: ignore[return-value]

        optimizer = make(name, params, loss, steps=row.steps, seed=seed)
        start = loss().item()
        for _ in range(row.steps):
            optimizer.step(loss)
        left.append(loss().item() / start)
    assert statistics.median(left) < row.goal


@EVERY
def test_forwards_are_counted_as_they_were_taken(name: str, tiny_model) -> None:
    run = Run(name, tiny_model("llama"))
    run.optimizer.full = FullObjective(run.loss, 1)
    run.optimizer.verify(lambda: 0.0)
    run.take(4)
    backward = 2 * 2 * sum(isinstance(record, ProjectionRecord) for record in run.records) if "dizo-fo" in name else 0
    counted = sum(record.forwards for record in run.records)
    assert counted == run.called + backward
    method = get_method(name)
    assert (
        method.forwards(TABLE[name].probes or method.probes, 4, method.options(TABLE[name].options), whole=1) == counted
    )


@EVERY
def test_a_loss_that_is_not_finite_skips_the_step(name: str, tiny_model) -> None:
    run = Run(name, tiny_model("llama"))
    run.optimizer.full = FullObjective(lambda: float("nan"), 1)
    run.take(0)
    before = copy.deepcopy(run.model.state_dict())
    run.optimizer.verify(lambda: 0.0)
    record = run.optimizer.measure(lambda: float("nan"))
    assert record.skipped
    run.optimizer.apply(record)
    run.optimizer.full = FullObjective(run.loss, 1)
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    run.step = 1
    run.take(3)
    assert not any(record.skipped for record in run.records if not isinstance(record, ProjectionRecord))
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


@EVERY
def test_the_state_has_the_size_that_its_theory_says(name: str, tiny_model) -> None:
    if TABLE[name].state is None:
        pytest.skip("a sum of what its parts hold")
    run = Run(name, tiny_model("llama")).take(3)
    held = sum(t.numel() for state in run.optimizer.state.values() for t in state.values())
    blocks = run.optimizer.blocks
    projected = sum(b.size for b in blocks if "q_proj" in b.name or "v_proj" in b.name)
    assert held == TABLE[name].state(sum(block.size for block in blocks), len(blocks), projected)


def test_a_tuned_combination_is_replayed_without_its_tuner(half) -> None:
    run = Run("zoft+zo-dap+mezo-momentum", half()).take(3)
    assert isinstance(run.optimizer.scales, LearnedScales)
    assert all(record.scales for record in run.records)
    assert not Contents().projections
