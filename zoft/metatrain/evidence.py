"""Does the tuner help? Runs of it and of its controls, at equal forwards, on rows it was not learned from.

Every contender is driven by networks on the same engine and gets its own best learning rate, found on one part of the
held-out rows; what is reported is its loss on the other part. The tuner competes at several strengths, and a card
ships the one that did best: strength 0, which is MeZO, where MeZO did.

There are two rounds. In short runs the highest rate that does not diverge looks best, so that a rate found there is
too high for a user's run. The first round is short, and says only who goes on and about where each one's rate is: the
best strength of the tuner, MeZO, and the best other control. Most of the budget is left for the second, in which these
run at two lower rates, several times as long. Its rates follow from the first's by `rate_for`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.registry import EvidenceRow, rate_for
from zoft.tuner.networks import PertNN

FACTOR = 3.0  # between neighbouring learning rates
STRENGTHS = (1.0, 0.5)
CONTROLS = 3  # sigma = 1, gradient energy, random
MIN_STEPS = 10  # of a run; fewer say nothing
LONGER = 2  # how often the second round holds the first at least
FIRST_RATES = (-1, 0, 1)  # powers of FACTOR around the centre
SECOND_RATES = (0, -1)
FINALISTS = 3
_LOSSES = ("loss_start", "loss", "chosen_by")


@dataclass(frozen=True)
class Trial:
    """One run: ``loss_start`` and ``loss`` on the rows that are reported, ``chosen_by`` on those that choose rates."""

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
        """What tells a run from the others of the same job."""
        return self.name, self.strength, self.lr, self.seed, self.forwards


@dataclass(frozen=True)
class Verdict:
    """What the trials say: ``text`` for people, the strength to ship, and the rate that served it best."""

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
        return label(self.name, self.strength)


def label(name: str, strength: float) -> str:
    """Return how a contender is called at a strength.

    >>> label("tuner", 1.0), label("tuner", 0.5)
    ('tuner', 'tuner^0.5')
    """
    return name if strength == 1.0 else f"{name}^{strength:g}"


@dataclass(frozen=True)
class Rounds:
    """Steps of the runs of both rounds, two forwards each, and how many runs there are."""

    first: int
    second: int
    runs: int


def rounds_within(budget: int, contenders: int, seeds: int) -> Rounds | None:
    """Return the rounds that ``budget`` forwards allow; None where the runs would be too short to say anything.

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
    """Run all contenders at three rates around ``centre``, and the finalists longer, at the rates that this suggests.

    ``run`` takes a contender, a learning rate, a seed and the number of steps. The second round's rates are the first's
    best one, lowered for the length of the run (`rate_for`), and a third of that.
    """
    first: dict[str, list[Trial]] = {}
    for contender in contenders:
        rates = [centre * FACTOR**power for power in FIRST_RATES]
        first[contender.label] = [run(contender, lr, seed, rounds.first) for lr in rates for seed in seeds]
    trials = [trial for own in first.values() for trial in own]
    for contender in finalists(contenders, first):
        about = rate_for(rounds.second, best_rate(first[contender.label]), rounds.first)
        trials += [
            run(contender, about * FACTOR**power, seed, rounds.second) for power in SECOND_RATES for seed in seeds
        ]
    return trials


def finalists(contenders: Sequence[Contender], trials: Mapping[str, Sequence[Trial]]) -> list[Contender]:
    """Return who goes on: the best strength of the tuner, MeZO, and the best of the other controls."""

    def best(own: list[Contender]) -> list[Contender]:
        return [min(own, key=lambda one: _mean(t.chosen_by for t in _at_best_rate(trials[one.label])))] if own else []

    sides = (
        lambda name: name == "tuner",
        lambda name: name == "mezo",
        lambda name: name not in ("tuner", "mezo"),
    )
    return [one for side in sides for one in best([c for c in contenders if side(c.name)])]


def best_rate(trials: Sequence[Trial]) -> float:
    """Return the rate with the lowest mean loss on the rows that choose; a run that diverged loses."""
    rates = sorted({trial.lr for trial in trials})
    return min(rates, key=lambda lr: _mean(trial.chosen_by for trial in trials if trial.lr == lr))


def longest(trials: Sequence[Trial]) -> list[Trial]:
    """Return the runs of the last round."""
    forwards = max(trial.forwards for trial in trials)
    return [trial for trial in trials if trial.forwards == forwards]


def judge(trials: Sequence[Trial], *, select_strength: bool, where: str) -> Verdict:
    """Return the verdict on the tuner: its strength, its rate, and a sentence on how it compares.

    Args:
        trials: all runs; those of the last round, among them some called ``tuner`` and ``mezo``, are judged.
        select_strength: whether the card may ship another strength than 1.
        where: the rows that are reported, in words.
    """
    best = _best_of_each(longest(trials))
    strengths = [key for key in best if key[0] == "tuner" and (select_strength or key[1] == 1.0)]
    tuner = min(strengths, key=lambda key: _mean(t.chosen_by for t in best[key]))
    controls = {name: best[name, strength] for name, strength in best if name != "tuner"}
    own = _mean(trial.loss for trial in best[tuner])
    lines = [_told(name, runs) for name, runs in controls.items()]
    better = [name for name, runs in controls.items() if not own < _mean(trial.loss for trial in runs)]
    label = "tuner" if tuner[1] == 1.0 else f"tuner at strength {tuner[1]:g}"
    start, forwards = _mean(t.loss_start for t in best[tuner]), best[tuner][0].forwards
    outcome = "The tuner wins." if not better else f"The tuner does NOT win: {' and '.join(better)} did better."
    text = (
        f"On {where}, {forwards} forwards from loss {start:.4f}, each at its own best learning rate: "
        f"{', '.join([_told(label, best[tuner]), *lines])}. {outcome}{_behind(trials)}"
    )
    mezo = controls["mezo"]
    if select_strength and _mean(t.chosen_by for t in mezo) <= _mean(t.chosen_by for t in best[tuner]):
        return Verdict(f"{text} So this card ships strength 0, which is MeZO.", 0.0, mezo[0].lr)
    return Verdict(text, tuner[1], best[tuner][0].lr)


def evidence_rows(trials: Sequence[Trial], *, task: str, split: str, eps: float) -> tuple[EvidenceRow, ...]:
    """Return the rows that a card keeps, one a run; a loss that is not finite is None."""
    return tuple(
        EvidenceRow(
            name=label(trial.name, trial.strength),
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
    """Return ``trial`` as JSON values; what is not finite is None."""
    values = dict(vars(trial))
    return {key: _finite(value) if isinstance(value, float) else value for key, value in values.items()}


def trial_of(row: dict[str, Any]) -> Trial:
    """Return the trial of a row of `trial_row`."""
    values: dict[str, Any] = {key: math.nan if row[key] is None and key in _LOSSES else row[key] for key in row}
    return Trial(**values)


def _behind(trials: Sequence[Trial]) -> str:
    """Who was left behind in the first round, in a sentence."""
    names = dict.fromkeys(label(trial.name, trial.strength) for trial in trials)
    last = {label(trial.name, trial.strength) for trial in longest(trials)}
    if not (out := [name for name in names if name not in last]):
        return ""
    return f" Behind after {min(trial.forwards for trial in trials)} forwards: {', '.join(out)}."


def _at_best_rate(trials: Sequence[Trial]) -> list[Trial]:
    best = best_rate(trials)
    return [trial for trial in trials if trial.lr == best]


def _best_of_each(trials: Sequence[Trial]) -> dict[tuple[str, float], list[Trial]]:
    """The runs of every contender at its best rate."""
    groups: dict[tuple[str, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.name, trial.strength), []).append(trial)
    return {key: _at_best_rate(group) for key, group in groups.items()}


def _told(name: str, trials: Sequence[Trial]) -> str:
    return f"{name} {_mean(trial.loss for trial in trials):.4f} (lr {trials[0].lr:.2g})"


def _mean(values: Any) -> float:
    """The mean; infinite if one of the values is not finite."""
    found = list(values)
    return sum(found) / len(found) if all(map(math.isfinite, found)) else math.inf


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
