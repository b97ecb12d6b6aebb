"""Summarise the cells: each method at its best rate, beside MeZO, as a table and as JSON."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.transfer.plan import Cell, Done, Method, best_rung, cells_of, rate
from zoft.compare.statistics import estimate

Curve = list[tuple[int, float]]
MEZO = "mezo"
ABSENT = "not measured"


@dataclass(frozen=True)
class Entry:
    """A method on a task at its best rate: mean and spread of the final dev loss over seeds, and the mean curve.

    ``ratio`` is the forwards to the loss where MeZO ends over those of the run: infinite where that was not reached,
    None where MeZO did not learn. ``at_edge`` says that no larger or no smaller rate was tried.
    """

    task: str
    method: str
    lr: float
    at_edge: bool
    start: float
    loss: float
    spread: float | None
    curve: Curve
    ratio: float | None


def entries(methods: Sequence[Method], tasks: Sequence[str], seeds: Sequence[int], done: Done) -> list[Entry]:
    """Return an entry for each task and method all of whose cells are done."""
    found = []
    for task in tasks:
        mezo = _entry(task, MEZO, seeds, done, None)
        for method in methods:
            entry = mezo if method.label == MEZO else _entry(task, method.label, seeds, done, mezo)
            if entry is not None:
                found.append(entry)
    return found


def _entry(task: str, method: str, seeds: Sequence[int], done: Done, mezo: Entry | None) -> Entry | None:
    cells = cells_of(task, method, seeds, done)
    if not all(cell in done for cell in cells):
        return None
    rungs = sorted({cell.rung for cell in cells})
    best = best_rung(task, method, seeds, done, rungs)
    runs = [done[Cell(task, method, best, seed)] for seed in seeds]
    curve = mean_curve([list(run.curve) for run in runs])
    losses = [run.loss for run in runs]
    return Entry(
        task=task,
        method=method,
        lr=rate(best),
        at_edge=best in (rungs[0], rungs[-1]),
        start=curve[0][1],
        loss=statistics.fmean(losses),
        spread=estimate(losses).spread,
        curve=curve,
        ratio=None if mezo is None or mezo.loss >= mezo.start else forwards_to(curve, mezo.loss) / mezo.curve[-1][0],
    )


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds; infinite from where one of them ended early."""
    longest = max(curves, key=len)
    return [
        (forwards, statistics.fmean(dict(curve).get(forwards, math.inf) for curve in curves)) for forwards, _ in longest
    ]


def forwards_to(curve: Curve, loss: float) -> float:
    """Return after how many forwards ``curve`` first is at ``loss`` or below, interpolated; infinite if never.

    >>> forwards_to([(0, 1.0), (50, 0.8), (100, 0.4)], 0.6)
    75.0
    """
    if curve[0][1] <= loss:
        return 0.0
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return after if math.isinf(high) else before + (after - before) * (high - loss) / (high - low)
    return math.inf


def table(methods: Sequence[Method], tasks: Sequence[str], found: Sequence[Entry]) -> str:
    """Return the Markdown table of all tasks, with medians and wins below."""
    by_place = {(entry.task, entry.method): entry for entry in found}
    labels = [method.label for method in methods]
    lines = ["| task | start | " + " | ".join(labels) + " |", "|---" * (len(labels) + 2) + "|"]
    for task in tasks:
        here = [by_place.get((task, label)) for label in labels]
        start = next((f"{entry.start:.3f}" for entry in here if entry), ABSENT)
        otherwise = [ABSENT if task not in method.tasks else "learned on" for method in methods]
        lines.append(
            f"| {task} | {start} | " + " | ".join(_outcome(e) or t for e, t in zip(here, otherwise, strict=True)) + " |"
        )
    lines.append(
        "| median share of MeZO's forwards | | " + " | ".join(_median(label, found) for label in labels) + " |"
    )
    for title, rival in (("against MeZO", lambda method: MEZO), ("against energy", _energy_of)):
        scores = [_score(method.label, rival(method), found) for method in methods]
        lines.append(f"| {title} | | " + " | ".join(scores) + " |")
    return "\n".join(lines)


def _energy_of(method: Method) -> str:
    """The energy control on the tasks of ``method``."""
    return Method("energy", method.tasks).label


def _outcome(entry: Entry | None) -> str:
    if entry is None:
        return ""
    spread = f" ± {entry.spread:.3f}" if entry.spread is not None else ""
    ratio = f"; {_ratio(entry.ratio)}" if entry.method != MEZO else ""
    return f"{entry.loss:.3f}{spread} ({entry.lr:.2g}{', edge' if entry.at_edge else ''}{ratio})"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "no ratio"
    return f"{ratio:.2f}" if math.isfinite(ratio) else "never"


def _median(label: str, found: Sequence[Entry]) -> str:
    ratios = [entry.ratio for entry in found if entry.method == label and entry.ratio is not None]
    return f"{_ratio(statistics.median(ratios))} of {len(ratios)}" if ratios and label != MEZO else ""


def _score(label: str, rival: str, found: Sequence[Entry]) -> str:
    theirs = {entry.task: entry.loss for entry in found if entry.method == rival}
    own = [entry for entry in found if entry.method == label and entry.task in theirs]
    wins = sum(entry.loss < theirs[entry.task] for entry in own)
    return f"{wins} won, {len(own) - wins} not" if own and label != rival else ""


def costs(rows: Sequence[tuple[Method, dict[str, Any] | None]]) -> str:
    """Return the Markdown table of the cost of preparing each method."""
    lines = ["| method | forwards before the first run | seconds |", "|---|---|---|"]
    for method, cost in rows:
        if method.label == MEZO:
            continue
        forwards = cost["forwards"] if cost else ABSENT
        seconds = f"{cost['seconds']:.0f}" if cost and cost["seconds"] is not None else ABSENT
        lines.append(f"| {method.label} | {forwards} | {seconds} |")
    return "\n".join(lines)
