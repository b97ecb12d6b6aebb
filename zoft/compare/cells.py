"""Cells (single runs), their outcomes, and which cells are needed next."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from zoft.compare.comparison import Comparison
from zoft.compare.config import ZERO_SHOT, MethodSpec
from zoft.compare.grid import STILL, first_rates, lower, needed, raised
from zoft.events import Event


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: ``method`` is a label; ``lr`` is None for a baseline."""

    model: str
    task: str
    method: str
    lr: float | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder and of the file of its outcome.

        >>> Cell("smol", "rte", "mezo", 1e-6, 2).name
        'smol.rte.mezo.lr1e-06.seed2'
        """
        rate = "" if self.lr is None else f".lr{self.lr:g}"
        return f"{self.model}.{self.task}.{self.method}{rate}.seed{self.seed}"


class Point(BaseModel):
    """An evaluation on dev during a run, with the forward passes and seconds so far."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    step: int
    forwards: int | float
    seconds: float
    loss: float
    metric: float | None


class Outcome(BaseModel):
    """Outcome of a cell.

    ``loss`` and ``metric`` are those of the kept weights (best on dev) on dev, ``test_loss`` and ``test_metric`` on
    test; a run that diverged has none of these. ``data_hash`` identifies its rows.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=(), ser_json_inf_nan="strings")

    cell: Cell
    status: Literal["done", "diverged"]
    metric_name: str
    loss: float | None = None
    metric: float | None = None
    test_loss: float | None = None
    test_metric: float | None = None
    steps: int = 0
    kept_step: int = 0
    forwards: int | float = 0
    examples: int = 0
    tokens: int = 0
    seconds: float
    peak_memory_bytes: int
    mean_memory_bytes: int | None
    data_hash: str | None = None
    curve: tuple[Point, ...] = ()

    @property
    def chosen_by(self) -> float:
        """Dev loss of the kept weights, by which learning rates are chosen; infinite if the run diverged."""
        return self.loss if self.loss is not None and math.isfinite(self.loss) else math.inf

    @property
    def moved(self) -> bool:
        """Whether the run changed the dev loss by 1 % or more; true for a run that diverged."""
        if self.status == "diverged" or len(self.curve) < 2:
            return True
        start, last = self.curve[0].loss, self.curve[-1].loss
        return abs(last - start) >= STILL * start


Done = Mapping[Cell, Outcome]


@dataclass(frozen=True)
class Plan:
    """The rates of one method on one model and task: all that are needed so far, and the best once it is known."""

    rates: tuple[float | None, ...]
    cells: tuple[Cell, ...]
    complete: bool
    best: float | None
    edge: bool


def plan_of(comparison: Comparison, model: str, task: str, spec: MethodSpec, done: Done) -> Plan:
    """Return the cells that ``spec`` needs on ``model`` and ``task``, finished ones included.

    A grid grows while its best rate, by the mean over seeds, is at an edge (`zoft.compare.grid.needed`).
    """
    config, card = comparison.config, comparison.card(spec)
    # With local rows the base's score is the same for every seed; of rows on the Hub, a seed draws a sample.
    seeds = config.seeds[:1] if spec.method == ZERO_SHOT and config.data is not None else config.seeds

    def cells(rate: float | None) -> list[Cell]:
        return [Cell(model, task, spec.label, rate, seed) for seed in seeds]

    def mean(rate: float | None) -> float | None:
        found = [done[cell].chosen_by for cell in cells(rate) if cell in done]
        return statistics.fmean(found) if len(found) == len(seeds) else None

    if spec.is_baseline:
        return Plan((None,), tuple(cells(None)), mean(None) is not None, None, False)
    rates = needed(
        first_rates(spec, config.lr, config.mode(spec), None if card is None else card.lr),
        mean,
        moved=lambda rate: done[cells(rate)[0]].moved,
        up=raised,
        down=lower,
        most=config.extensions,
    )
    complete = all(mean(rate) is not None for rate in rates)
    ordered = sorted(rates)
    best = min(ordered, key=lambda rate: mean(rate) or 0.0) if complete else None
    edge = best in (ordered[0], ordered[-1])
    return Plan(tuple(ordered), tuple(cell for rate in rates for cell in cells(rate)), complete, best, edge)


def all_cells(comparison: Comparison, done: Done) -> list[Cell]:
    """Return every cell that is needed so far: one method after another on each task, so that rows fill evenly."""
    config = comparison.config
    return [
        cell
        for model in config.models
        for task in config.task_names
        for spec in config.methods
        for cell in plan_of(comparison, model.name, task, spec, done).cells
    ]


@dataclass(frozen=True)
class CellStarted:
    """A run starts or resumes; ``done`` of ``total`` runs are finished, a total that grows with the grids."""

    cell: Cell
    done: int
    total: int


@dataclass(frozen=True)
class CellDone:
    """A run is finished."""

    outcome: Outcome
    done: int
    total: int


@dataclass(frozen=True)
class CellFailed:
    """A run failed; the others go on, and it is tried again the next time."""

    cell: Cell
    why: str


CompareEvent = CellStarted | CellDone | CellFailed | Event
CompareListener = Callable[[CompareEvent], None]
