"""Test a tuner against its controls at equal forward passes, on rows that it was not learned from.

Every contender is networks that drive the same optimizer, at its own best learning rate, found on one part of the
held-out rows; its loss on the other part is reported. The tuner competes at several strengths, and the card ships the
one that was best: strength 0, which is MeZO, if MeZO was best.

There are two rounds. In short runs the highest rate that does not diverge looks best, which is too high for a user's
run. So the first round is short, and only selects the finalists (the best strength of the tuner, MeZO, and the best
other control) and an approximate rate for each. Most of the budget is left for the second, in which the finalists run
at two lower rates, several times as long. Its rates follow from the first's by `rate_for`.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from zoft.registry import Evidence, EvidenceRow, mean, rate_for
from zoft.tuner.networks import PertNN

FACTOR = 3.0  # between neighbouring learning rates
STRENGTHS = (1.0, 0.5)
CONTROLS = 3  # sigma = 1, gradient energy, random
MIN_STEPS = 10  # of a run; shorter runs are not informative
LONGER = 2  # length of the runs of the second round over those of the first, at least
FIRST_RATES = (-1, 0, 1)  # powers of FACTOR around the centre
SECOND_RATES = (0, -1)
FINALISTS = 3
_LOSSES = ("loss_start", "loss", "chosen_by")


@dataclass(frozen=True)
class Trial:
    """One run: ``loss_start`` and ``loss`` on the reported rows, ``chosen_by`` on the rows that choose rates."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # of a row that is read

    name: str
    strength: float
    lr: float
    seed: int
    forwards: int
    loss_start: float
    loss: float
    chosen_by: float
    metric: float | None
    metric_name: str | None

    @property
    def key(self) -> tuple[str, float, float, int, int]:
        """What identifies a run among those of the same job."""
        return self.name, self.strength, self.lr, self.seed, self.forwards

    @property
    def label(self) -> str:
        """Name of the contender."""
        return Evidence.label(self.name, self.strength)

    @property
    def task(self) -> str:
        """Empty: all runs of a job are on one task."""
        return ""


_TRIALS = TypeAdapter(Trial)


@dataclass(frozen=True)
class Verdict:
    """Outcome of the trials: ``text`` for people, the strength to ship, and the best rate for it."""

    text: str
    strength: float
    lr: float


@dataclass(frozen=True)
class Contender:
    """Networks that compete under ``name`` at one strength."""

    name: str
    net: PertNN
    strength: float = 1.0

    @property
    def label(self) -> str:
        """Name and strength."""
        return Evidence.label(self.name, self.strength)


@dataclass(frozen=True)
class Rounds:
    """Steps of the runs in each round, two forwards a step, and the number of runs."""

    first: int
    second: int
    runs: int


def rounds_within(budget: int, contenders: int, seeds: int) -> Rounds | None:
    """Return the rounds that ``budget`` forwards allow; None if the runs would be too short to be informative.

    A third goes to the first round, unless its runs need more to have `MIN_STEPS` steps.

    >>> rounds_within(1066, contenders=5, seeds=1)
    Rounds(first=11, second=61, runs=21)
    """
    in_first = len(FIRST_RATES) * contenders * seeds
    in_second = len(SECOND_RATES) * min(FINALISTS, contenders) * seeds
    first = max(MIN_STEPS, budget // (3 * 2 * in_first))
    second = (budget - 2 * first * in_first) // (2 * in_second)
    return Rounds(first, second, in_first + in_second) if second >= LONGER * first else None


Run = Callable[[Contender, float, int, int], Trial]


def compete(
    contenders: Sequence[Contender], run: Run, centre: float, seeds: Sequence[int], rounds: Rounds
) -> list[Trial]:
    """Run all contenders at three rates around ``centre``, then the finalists longer, at rates derived from the first.

    ``run`` takes a contender, a learning rate, a seed and the number of steps. The second round's rates are the first's
    best one, lowered for the length of the run (`rate_for`), and a third of that.
    """
    first: dict[str, list[Trial]] = {}
    for contender in contenders:
        rates = [centre * FACTOR**power for power in FIRST_RATES]
        first[contender.label] = [run(contender, lr, seed, rounds.first) for lr in rates for seed in seeds]
    trials = [trial for own in first.values() for trial in own]
    for contender in finalists(contenders, first):
        about = rate_for(rounds.second, Evidence(first[contender.label]).best_rate(), rounds.first)
        trials += [
            run(contender, about * FACTOR**power, seed, rounds.second) for power in SECOND_RATES for seed in seeds
        ]
    return trials


def finalists(contenders: Sequence[Contender], trials: Mapping[str, Sequence[Trial]]) -> list[Contender]:
    """Return the contenders of the second round: the tuner at its best strength, MeZO, and the best other control."""

    def best(own: list[Contender]) -> list[Contender]:
        return [min(own, key=lambda one: _chosen_by(Evidence(trials[one.label]).at_best_rate()))] if own else []

    sides = (
        lambda name: name == "tuner",
        lambda name: name == "mezo",
        lambda name: name not in ("tuner", "mezo"),
    )
    return [one for side in sides for one in best([c for c in contenders if side(c.name)])]


def judge(trials: Sequence[Trial], *, select_strength: bool, where: str) -> Verdict:
    """Return the verdict on the tuner: its strength, its rate, and a sentence on how it compares.

    Args:
        trials: all runs; those of the last round are judged, some called ``tuner`` and ``mezo`` among them.
        select_strength: whether the card may ship another strength than 1.
        where: the rows that are reported, in words.
    """
    best = {label: own.at_best_rate() for label, own in Evidence(trials).longest().contenders().items()}
    tuners = [own for own in best.values() if own.runs[0].name == "tuner"]
    tuner = min((own for own in tuners if select_strength or own.runs[0].strength == 1.0), key=_chosen_by)
    controls = {label: own for label, own in best.items() if own not in tuners}
    shipped = tuner.runs[0]
    better = [label for label, own in controls.items() if not _loss(tuner) < _loss(own)]
    name = "tuner" if shipped.strength == 1.0 else f"tuner at strength {shipped.strength:g}"
    scores = ", ".join(_score(label, own) for label, own in {name: tuner, **controls}.items())
    outcome = "The tuner wins." if not better else f"The tuner does NOT win: {' and '.join(better)} did better."
    text = (
        f"On {where}, {shipped.forwards} forwards from loss {mean(trial.loss_start for trial in tuner.runs):.4f}, each "
        f"at its own best learning rate: {scores}. {outcome}{_behind(trials)}"
    )
    mezo = controls["mezo"]
    if select_strength and _chosen_by(mezo) <= _chosen_by(tuner):
        return Verdict(f"{text} So this card ships strength 0, which is MeZO.", 0.0, mezo.runs[0].lr)
    return Verdict(text, shipped.strength, shipped.lr)


def evidence_rows(trials: Sequence[Trial], *, task: str, split: str, eps: float) -> tuple[EvidenceRow, ...]:
    """Return the rows of a card, one for each run; a loss that is not finite is None."""
    return tuple(
        EvidenceRow(
            name=trial.label,
            task=task,
            split=split,
            lr=trial.lr,
            eps=eps,
            forwards=trial.forwards,
            seed=trial.seed,
            loss_start=_finite(trial.loss_start),
            loss=_finite(trial.loss),
            metric=_finite(trial.metric),
            metric_name=trial.metric_name,
        )
        for trial in trials
    )


def trial_row(trial: Trial) -> dict[str, Any]:
    """Return ``trial`` as JSON values, with their checksum; numbers that are not finite are None."""
    values = dict(vars(trial))
    row = {key: _finite(value) if isinstance(value, float) else value for key, value in values.items()}
    return {**row, "crc32": _checksum(row)}


def trial_of(row: dict[str, Any]) -> Trial | None:
    """Return the trial that `trial_row` wrote as ``row``; None if the row is damaged (0.1 wrote no checksum)."""
    values = dict(row)
    checksum = values.pop("crc32", None)
    if checksum not in (None, _checksum(values)):
        return None
    try:
        values |= {key: math.nan for key in _LOSSES if values[key] is None}
        return _TRIALS.validate_json(json.dumps(values))
    except (ValidationError, KeyError):
        return None


def _checksum(row: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def _behind(trials: Sequence[Trial]) -> str:
    """Which contenders were left behind in the first round, in a sentence."""
    last = Evidence(trials).longest().contenders()
    if not (out := [label for label in Evidence(trials).contenders() if label not in last]):
        return ""
    return f" Behind after {min(trial.forwards for trial in trials)} forwards: {', '.join(out)}."


def _chosen_by(runs: Evidence[Trial]) -> float:
    return mean(trial.chosen_by for trial in runs.runs)


def _loss(runs: Evidence[Trial]) -> float:
    return mean(trial.loss for trial in runs.runs)


def _score(name: str, runs: Evidence[Trial]) -> str:
    return f"{name} {_loss(runs):.4f} (lr {runs.runs[0].lr:.2g})"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
