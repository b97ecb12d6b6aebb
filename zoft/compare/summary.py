"""Summarise the outcomes: one row for each model, task and method, at its best learning rate."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zoft.compare.cells import Done, Outcome, plan_of
from zoft.compare.comparison import Comparison
from zoft.compare.config import MethodSpec
from zoft.compare.statistics import Estimate, Scores, estimate

Kind = Literal["zeroth-order", "bound", "baseline"]


@dataclass(frozen=True)
class CurvePoint:
    """The mean over seeds of a dev evaluation; infinite if one of the runs had diverged before."""

    forwards: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class RateTried:
    """A learning rate of a grid: the mean dev loss of its runs, infinite if one diverged."""

    lr: float
    loss: float


@dataclass(frozen=True)
class Row:
    """A method on a model and a task, at the learning rate that was best on dev.

    ``loss`` and ``metric`` are on ``split``: test, or dev if the task has no test rows; None if every rate
    diverged. ``edge``: the best rate is the largest or smallest that was tried. ``forwards``, ``tokens``,
    ``seconds`` and average memory (bytes) are means of the runs at that rate, peak memory is their largest;
    ``all_forwards`` are those of all rates and seeds, ``meta_forwards`` the cost of a named tuner's meta-training, else
    None.
    """

    model: str
    task: str
    method: str
    kind: Kind
    lr: float | None
    edge: bool
    seeds: int
    split: str
    metric_name: str
    loss: Estimate | None
    metric: Estimate | None
    dev_loss: float
    steps: int
    forwards: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    mean_memory_bytes: int | None
    all_forwards: int
    meta_forwards: int | None
    curve: tuple[CurvePoint, ...]
    rates: tuple[RateTried, ...]

    @property
    def place(self) -> str:
        """Model and task."""
        return f"{self.model} / {self.task}"


def rows_of(comparison: Comparison, done: Done) -> list[Row]:
    """Return the rows all of whose runs are done."""
    config = comparison.config
    rows = (
        _row(comparison, model.name, task, spec, done)
        for model in config.models
        for task in config.task_names
        for spec in config.methods
    )
    return [row for row in rows if row is not None]


def _row(comparison: Comparison, model: str, task: str, spec: MethodSpec, done: Done) -> Row | None:
    plan, card = plan_of(comparison, model, task, spec, done), comparison.card(spec)
    if not plan.complete:
        return None
    runs = [done[cell] for cell in plan.cells if cell.lr == plan.best]
    everything = [done[cell] for cell in plan.cells]
    finished = all(run.status == "done" for run in runs)
    tested = finished and all(run.test_loss is not None for run in runs)
    means = [run.mean_memory_bytes for run in runs if run.mean_memory_bytes is not None]
    return Row(
        model=model,
        task=task,
        method=spec.label,
        kind="baseline" if spec.is_baseline else "zeroth-order" if spec.is_zeroth_order else "bound",
        lr=plan.best,
        edge=plan.edge,
        seeds=len(runs),
        split="test" if tested else "dev",
        metric_name=next((run.metric_name for run in done.values() if run.cell.task == task and run.metric_name), ""),
        loss=_estimate([run.test_loss if tested else run.loss for run in runs]) if finished else None,
        metric=_estimate([run.test_metric if tested else run.metric for run in runs]) if finished else None,
        dev_loss=statistics.fmean(run.chosen_by for run in runs),
        steps=max(run.steps for run in runs),
        forwards=round(statistics.fmean(run.forwards for run in runs)),
        tokens=round(statistics.fmean(run.tokens for run in runs)),
        seconds=statistics.fmean(run.seconds for run in runs),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        mean_memory_bytes=round(statistics.fmean(means)) if len(means) == len(runs) else None,
        all_forwards=round(sum(run.forwards for run in everything)),
        meta_forwards=None if card is None else card.forwards,
        curve=mean_curve(runs),
        rates=tuple(
            RateTried(rate, statistics.fmean(run.chosen_by for run in everything if run.cell.lr == rate))
            for rate in plan.rates
            if rate is not None
        ),
    )


def _estimate(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if len(known) == len(values) else None


def mean_curve(runs: Sequence[Outcome]) -> tuple[CurvePoint, ...]:
    """Return the mean over runs of their dev evaluations, step by step; infinite from where one of them ends early."""
    longest = max((run.curve for run in runs), key=len)
    by_step = [{point.step: point for point in run.curve} for run in runs]
    points = []
    for place in longest:
        here = [found[place.step] for found in by_step if place.step in found]
        loss = statistics.fmean(point.loss for point in here) if len(here) == len(runs) else math.inf
        points.append(CurvePoint(place.forwards, statistics.fmean(point.seconds for point in here), loss))
    return tuple(points)


def scores_by(rows: Sequence[Row], what: Literal["loss", "metric"]) -> Scores:
    """Return the scores of the zeroth-order methods by ``what``, the larger the better.

    A method that diverged at every rate, or whose score is not finite, loses; a task without a metric is left out.
    """
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.kind != "zeroth-order" or (row.loss is not None and what == "metric" and row.metric is None):
            continue
        found = row.loss if what == "loss" else row.metric
        lower_is_better = what == "loss" or row.metric_name == "perplexity"
        value = -math.inf
        if found is not None and math.isfinite(found.mean):
            value = -found.mean if lower_is_better else found.mean
        scores.setdefault(row.method, {})[row.place] = value
    return scores
