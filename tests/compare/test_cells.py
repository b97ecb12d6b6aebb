"""Which runs follow from those that are done, and the row that comes of them."""

import math
from pathlib import Path
from typing import Any

import pytest

from zoft.compare import CompareConfig
from zoft.compare.cells import Cell, Outcome, Point, all_cells, plan_of
from zoft.compare.comparison import Comparison
from zoft.compare.folder import CompareFolder, SharedFolder
from zoft.compare.grid import needed
from zoft.compare.report import write_report
from zoft.compare.statistics import firsts
from zoft.compare.summary import rows_of, scores_by
from zoft.errors import RunError

MEZO = {"method": "mezo", "lr": [1e-5, 3e-5]}


def comparison_of(**changes: Any) -> Comparison:
    given = {"models": ["base"], "tasks": ["sst2"], "data": "d", "methods": [MEZO], "budget": 100}
    return Comparison(CompareConfig.model_validate(given | changes))


def outcome(lr: float | None, loss: float | None, *, last: float | None = None, **changes: Any) -> Outcome:
    """A run of 100 forwards from a dev loss of 1 to ``loss`` at best, ``last`` at the end; None: it diverged."""
    kept = {"method": "mezo", "task": "sst2", "seed": 0} | {
        key: changes.pop(key) for key in ("method", "task", "seed") if key in changes
    }
    end = last if last is not None else loss
    curve = [Point(step=0, forwards=0, seconds=1.0, loss=1.0, metric=0.5)]
    if end is not None:
        curve.append(Point(step=50, forwards=100, seconds=5.0, loss=end, metric=0.6))
    told = {"test_loss": loss, "test_metric": 0.75, "metric": 0.7} if loss is not None else {}
    return Outcome(
        cell=Cell("base", kept["task"], kept["method"], lr, kept["seed"]),
        status="diverged" if loss is None else "done",
        metric_name="accuracy",
        loss=loss,
        forwards=100,
        tokens=1000,
        seconds=6.0,
        peak_memory_bytes=10,
        mean_memory_bytes=8,
        curve=tuple(curve),
        **(told | changes),
    )


def done(*outcomes: Outcome) -> dict[Cell, Outcome]:
    return {one.cell: one for one in outcomes}


def rates(comparison: Comparison, *outcomes: Outcome) -> tuple[float | None, ...]:
    return plan_of(comparison, "base", "sst2", comparison.config.methods[0], done(*outcomes)).rates


def test_a_grid_grows_by_three_until_its_best_is_inside():
    comparison = comparison_of()
    assert rates(comparison) == (1e-5, 3e-5)
    assert rates(comparison, outcome(1e-5, 0.9)) == (1e-5, 3e-5)  # not all are done
    rising = [outcome(1e-5, 0.9), outcome(3e-5, 0.8)]
    assert rates(comparison, *rising) == (1e-5, 3e-5, 9e-5)
    inside = plan_of(comparison, "base", "sst2", comparison.config.methods[0], done(*rising, outcome(9e-5, 0.85)))
    assert (inside.best, inside.edge, inside.complete) == (3e-5, False, True)
    assert rates(comparison, outcome(1e-5, 0.8), outcome(3e-5, None)) == (3.33e-6, 1e-5, 3e-5)


def test_a_row_whose_grid_may_not_grow_is_marked_edge():
    comparison = comparison_of(extensions=1)
    found = done(outcome(1e-5, 0.9), outcome(3e-5, 0.8), outcome(9e-5, 0.7))
    (row,) = rows_of(comparison, found)
    assert (row.lr, row.edge) == (9e-5, True)
    assert not rows_of(comparison_of(extensions=2), found)  # one more run is needed first


def test_a_rate_that_moved_nothing_is_followed_by_larger_ones_only():
    comparison = comparison_of()
    still = [outcome(1e-5, 0.9995), outcome(3e-5, 1.0, last=1.001)]
    assert rates(comparison, *still) == (1e-5, 3e-5, 9e-5)
    # Moved, for the worse: the weights of the start were kept everywhere, and something smaller may help.
    assert rates(comparison, outcome(1e-5, 1.0, last=1.5), outcome(3e-5, 1.0, last=2.0)) == (3.33e-6, 1e-5, 3e-5)


def test_rates_are_chosen_by_the_mean_over_seeds():
    comparison = comparison_of(seeds=[0, 1], extensions=0)
    found = done(
        outcome(1e-5, 0.8), outcome(1e-5, 0.8, seed=1), outcome(3e-5, 0.5), outcome(3e-5, None, seed=1)
    )  # fmt: skip
    (row,) = rows_of(comparison, found)
    assert row.lr == 1e-5 and row.loss is not None and row.loss.mean == 0.8
    assert [one.loss for one in row.rates] == [0.8, math.inf]


def test_a_grid_has_a_limit_at_each_end():
    values = {place: float(-place) for place in range(20)}
    assert needed([0, 1], values.get, moved=lambda _: True, up=lambda p: p + 1, down=lambda p: p - 1, most=3) == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_a_method_that_always_diverges_is_a_row_that_loses():
    comparison = comparison_of(methods=[MEZO, {"method": "mezo", "label": "other", "lr": [1e-5]}], extensions=0)
    found = done(outcome(1e-5, None), outcome(3e-5, None), outcome(1e-5, 0.9, method="other"))
    first, second = rows_of(comparison, found)
    assert first.loss is None and second.loss is not None
    assert firsts(scores_by([first, second], "loss")) == {"mezo": (0, 1), "other": (1, 1)}


def test_a_row_is_the_mean_of_its_seeds():
    comparison = comparison_of(seeds=[0, 1, 2], methods=[{"method": "mezo", "lr": [1e-5]}], extensions=0)
    found = [outcome(1e-5, loss, seed=seed) for seed, loss in enumerate((0.5, 0.6, 0.7))]
    (row,) = rows_of(comparison, done(*found))
    assert row.loss is not None and row.metric is not None and row.seeds == 3 and row.split == "test"
    assert row.loss.mean == pytest.approx(0.6) and row.loss.spread == pytest.approx(0.1)
    assert (row.forwards, row.all_forwards, row.tokens) == (100, 300, 1000)
    assert [(point.forwards, round(point.loss, 9)) for point in row.curve] == [(0, 1.0), (100, 0.6)]


def test_the_base_is_scored_once_where_its_rows_are_the_same():
    methods, seeds = ["zero-shot", "icl"], [0, 1]
    here = all_cells(comparison_of(methods=methods, seeds=seeds), {})
    assert [(cell.method, cell.seed) for cell in here] == [("zero-shot", 0), ("icl", 0), ("icl", 1)]
    hub = all_cells(comparison_of(methods=methods, seeds=seeds, data=None), {})
    assert len(hub) == 4  # there a seed samples the rows


def test_an_outcome_survives_its_file(tmp_path: Path):
    folder = CompareFolder(tmp_path)
    folder.open({})
    kept = [outcome(1e-5, 0.5, last=math.inf), outcome(3e-5, None)]
    for one in kept:
        folder.keep(one)
    assert CompareFolder(tmp_path).done() == done(*kept)
    first = CompareFolder(tmp_path)._file(kept[0].cell)
    content = first.read_text()
    for damaged in (b"", content[:40].encode(), b"\xff\x00"):
        first.write_bytes(damaged)
        again = CompareFolder(tmp_path)
        assert again.done() == done(kept[1]) and not again.has(kept[0].cell) and again.has(kept[1].cell)
    again.keep(kept[0])
    assert again.done() == done(*kept)
    (tmp_path / "cells" / "torn.json").write_text('{"cell": 1}')
    with pytest.raises(RunError, match=r"torn\.json is not an outcome"):
        CompareFolder(tmp_path).done()


def test_a_folder_takes_more_and_nothing_else(tmp_path: Path):
    folder = SharedFolder(tmp_path)
    folder.open({"budget": 50})
    folder.open({"budget": 50, "method mezo": {}})
    with pytest.raises(RunError, match="budget is 50 there, 60 here"):
        folder.open({"budget": 60})


def test_a_claim_is_one_process_s(tmp_path: Path):
    folder, other = SharedFolder(tmp_path), SharedFolder(tmp_path)
    folder.open({})
    with folder.claimed("cell") as ours, other.claimed("cell") as theirs:
        assert (ours, theirs) == (True, False)
    with other.claimed("cell") as theirs:
        assert theirs


def test_runs_on_other_rows_are_not_compared(tmp_path: Path):
    comparison = comparison_of(methods=[MEZO], extensions=0)
    found = done(outcome(1e-5, 0.9, data_hash="a"), outcome(3e-5, 0.8, data_hash="b"))
    with pytest.raises(RunError, match="different train or dev rows"):
        write_report(comparison, found, tmp_path)


def test_a_picture_of_many_methods_has_one_legend():
    pytest.importorskip("matplotlib")
    from zoft.compare.pictures import loss_over_forwards, loss_over_rate

    labels = [f"method-{number}" for number in range(12)]
    methods = [{"method": "mezo", "label": label, "lr": [1e-5]} for label in labels]
    comparison = comparison_of(methods=methods, extensions=0)
    losses = [None if number == 3 else 0.5 + number / 100 for number in range(12)]
    rows = rows_of(comparison, done(*[outcome(1e-5, loss, method=m) for m, loss in zip(labels, losses, strict=True)]))
    for svg in (loss_over_forwards(rows), loss_over_rate(rows)):
        assert all(svg.count(f">{label}<") == 1 for label in labels)
        assert svg == (loss_over_forwards(rows) if "forward passes" in svg else loss_over_rate(rows))


def test_scores_that_are_not_finite_or_not_there():
    comparison = comparison_of(methods=[MEZO, {"method": "mezo", "label": "other", "lr": [1e-5]}], extensions=0)
    broken = [outcome(1e-5, 0.9, test_loss=math.nan, test_metric=None), outcome(3e-5, 0.95)]
    rows = rows_of(comparison, done(*broken, outcome(1e-5, 0.9, method="other", test_metric=None)))
    assert firsts(scores_by(rows, "loss")) == {"mezo": (0, 1), "other": (1, 1)}
    assert scores_by(rows, "metric") == {}
