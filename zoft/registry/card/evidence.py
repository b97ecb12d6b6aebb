"""Evidence: runs of several contenders on held-out rows, and which of them were best."""

import math
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Run(Protocol):
    """One run of a contender: a row of a card (`EvidenceRow`) or a trial of a meta-training.

    Learning rates are chosen by ``chosen_by``, the lower the better; a run that diverged has one that is not finite.
    """

    @property
    def label(self) -> str:
        """Name of the contender, see `Evidence.label`."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def lr(self) -> float:
        """Learning rate."""

    @property
    def forwards(self) -> int:
        """Forward passes."""

    @property
    def seed(self) -> int:
        """Seed."""

    @property
    def loss(self) -> float | None:
        """Loss that is reported; None or not finite if the run diverged."""

    @property
    def chosen_by(self) -> float:
        """Loss that rates are chosen by."""


R = TypeVar("R", bound=Run)


class Evidence(Generic[R]):
    """Runs of one or more contenders, in the order in which they were made."""

    def __init__(self, runs: Iterable[R]) -> None:
        self.runs = tuple(runs)

    @staticmethod
    def label(name: str, strength: float) -> str:
        """Return the name of the contender ``name`` at a strength; at strength 0 every contender is MeZO.

        >>> [Evidence.label("tuner", strength) for strength in (1.0, 0.5, 0.0)]
        ['tuner', 'tuner^0.5', 'mezo']
        """
        return name if strength == 1.0 else f"{name}^{strength:g}" if strength else "mezo"

    def contenders(self) -> "dict[str, Evidence[R]]":
        """Return the runs of each contender, by label."""
        by_label: dict[str, list[R]] = {}
        for run in self.runs:
            by_label.setdefault(run.label, []).append(run)
        return {label: Evidence(runs) for label, runs in by_label.items()}

    def longest(self) -> "Evidence[R]":
        """Return the last round: on each task, the runs of the most forward passes."""
        most: dict[str, int] = {}
        for run in self.runs:
            most[run.task] = max(run.forwards, most.get(run.task, 0))
        return Evidence(run for run in self.runs if run.forwards == most[run.task])

    def best_rate(self) -> float:
        """Return the learning rate with the lowest mean of ``chosen_by``; a rate at which a run diverged loses."""
        rates = sorted({run.lr for run in self.runs})
        return min(rates, key=lambda lr: mean(run.chosen_by for run in self.runs if run.lr == lr))

    def at_best_rate(self) -> "Evidence[R]":
        """Return the runs at `best_rate`, of all seeds."""
        lr = self.best_rate()
        return Evidence(run for run in self.runs if run.lr == lr)

    def best(self) -> list[R]:
        """Return the best run of each contender on each task at each seed, in the order of the evidence."""
        best: dict[tuple[str, str, int], R] = {}
        for run in self.runs:
            key = (run.label, run.task, run.seed)
            if key not in best or run.chosen_by < best[key].chosen_by:
                best[key] = run
        return list(best.values())

    def gain(self, label: str, over: str = "mezo") -> float | None:
        """Return by how much ``label`` ended below ``over``, in the units of the loss: a mean over tasks and seeds.

        Each is taken at its best run. None if no pair of runs compares them.
        """
        finite = Evidence(run for run in self.runs if run.loss is not None)
        losses = {(run.label, run.task, run.seed): run.loss for run in finite.best() if run.loss is not None}
        gains = [
            loss - losses[label, task, seed]
            for (name, task, seed), loss in losses.items()
            if name == over and (label, task, seed) in losses
        ]
        return sum(gains) / len(gains) if gains else None


def mean(values: Iterable[float]) -> float:
    """Return the mean; infinite if a value is not finite."""
    found = list(values)
    return sum(found) / len(found) if all(map(math.isfinite, found)) else math.inf
