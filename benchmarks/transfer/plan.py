"""The plan: methods, rates, tasks and seeds, and which cells are needed next."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zoft.compare.grid import FACTOR, STILL, needed

CENTRE = 1e-5  # of the grid of learning rates
EXTENSIONS = 4  # rates tried beyond each end of the first three, at most

# What each tuner changes in the defaults of `zoft.metatrain.MetatrainConfig`; NEVER is filled in with the steps.
NEVER = "never"
PRESETS: dict[str, dict[str, Any]] = {
    "tuner": {},
    "tuner-no-reset": {"reset_every": NEVER},
    "tuner-layer": {"granularity": ("layer",)},
    "paper": {"preset": "paper"},
    "paper-no-reset": {"preset": "paper", "reset_every": NEVER},
    "paper-layer": {"preset": "paper", "granularity": ("layer",)},
    "paper-no-normalise": {"preset": "paper", "effective_size": "none"},
}
METHODS = ("mezo", "energy", *PRESETS)


@dataclass(frozen=True)
class Method:
    """A method: a name of `METHODS` with the tasks that its tuner was learned on, or the file of a given card."""

    name: str
    tasks: tuple[str, ...] = ()
    file: str | None = None

    @property
    def label(self) -> str:
        """Name in tables and, with ``+`` between tasks, in files.

        >>> Method("tuner", ("copa", "sst2")).label
        'tuner@copa+sst2'
        """
        return f"{self.name}@{'+'.join(self.tasks)}" if self.tasks else self.name

    def settings(self, meta_steps: int) -> dict[str, Any]:
        """Settings of this tuner's meta-training beyond the common ones."""
        given = PRESETS[self.name]
        return {key: meta_steps if value == NEVER else value for key, value in given.items()}


@dataclass(frozen=True)
class Cell:
    """One run: ``rung`` is the place of its learning rate on the grid, 0 the centre."""

    task: str
    method: str
    rung: int
    seed: int

    @property
    def lr(self) -> float:
        """The learning rate."""
        return rate(self.rung)

    @property
    def name(self) -> str:
        """Name of its file.

        >>> Cell("rte", "tuner@copa", -1, 2).name
        'rte.tuner@copa.lr3.33e-06.seed2'
        """
        return f"{self.task}.{self.method}.lr{self.lr:g}.seed{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """Outcome of a cell.

    ``curve`` has the dev loss after so many forwards, from 0 on; it is infinite where the run has diverged.
    ``tuner`` tells the networks of a run from others of the same name; ``tokens`` are those of the training forwards.
    """

    cell: Cell
    tuner: str
    curve: tuple[tuple[int, float], ...]
    metric: float | None
    metric_name: str
    seconds: float
    tokens: int

    @property
    def loss(self) -> float:
        """Dev loss at the end."""
        return self.curve[-1][1]

    def to_json(self) -> str:
        """As JSON; an infinite loss is null."""
        values = asdict(self)
        values["lr"] = self.cell.lr
        values["curve"] = [[forwards, loss if math.isfinite(loss) else None] for forwards, loss in self.curve]
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Outcome":
        """Return the outcome that `to_json` wrote."""
        values = json.loads(text)
        del values["lr"]
        curve = tuple((forwards, math.inf if loss is None else loss) for forwards, loss in values.pop("curve"))
        return cls(cell=Cell(**values.pop("cell")), curve=curve, **values)


Done = Mapping[Cell, Outcome]


def rate(rung: int) -> float:
    """Return the learning rate at a place of the grid: factor 3 from rung to rung.

    >>> [rate(rung) for rung in (-1, 0, 1)]
    [3.33e-06, 1e-05, 3e-05]
    """
    return float(f"{CENTRE * FACTOR**rung:.3g}")


def cells_of(task: str, method: str, seeds: Sequence[int], done: Done) -> list[Cell]:
    """Return the cells that ``task`` and ``method`` need, finished ones included.

    Three rates at first; when all their seeds are done, one more beyond the best while the best is at an edge. The
    largest rate must have moved the loss, and below one that has not there is nothing to try.
    """
    rungs = needed(
        [0, 1, -1],
        lambda rung: _mean(task, method, rung, seeds, done),
        moved=lambda rung: _moved(Cell(task, method, rung, seeds[0]), done),
        up=lambda rung: rung + 1,
        down=lambda rung: rung - 1,
        most=EXTENSIONS,
    )
    return [Cell(task, method, rung, seed) for rung in rungs for seed in seeds]


def best_rung(task: str, method: str, seeds: Sequence[int], done: Done, rungs: Iterable[int]) -> int:
    """Return the place with the lowest mean dev loss at the end, all being done; of equals, the smallest rate."""
    return min(sorted(rungs), key=lambda rung: _mean(task, method, rung, seeds, done) or 0.0)


def _mean(task: str, method: str, rung: int, seeds: Sequence[int], done: Done) -> float | None:
    """Mean dev loss at the end over seeds; None while one of them is not done."""
    found = [done[cell].loss for seed in seeds if (cell := Cell(task, method, rung, seed)) in done]
    return statistics.fmean(found) if len(found) == len(seeds) else None


def _moved(cell: Cell, done: Done) -> bool:
    start = done[cell].curve[0][1]
    return abs(done[cell].loss - start) >= STILL * start


def pairs(methods: Sequence[Method], tasks: Sequence[str]) -> list[tuple[str, Method]]:
    """Return which method runs on which task: none on a task that it was learned on."""
    return [(task, method) for task in tasks for method in methods if task not in method.tasks]
