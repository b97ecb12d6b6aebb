"""Does the tuner help? Short runs of it and of its controls, at equal forwards, on rows it was not learned from.

Every contender is driven by networks on the same engine and gets its own best learning rate, found on one part of the
held-out rows; what is reported is its loss on the other part. The tuner competes at several strengths, and a card
ships the one that did best: strength 0, which is MeZO, where MeZO did.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zoft.pertnn import PertNN
from zoft.registry.schema import EvidenceRow

FACTOR = 3.0  # between neighbouring learning rates
STRENGTHS = (1.0, 0.5)
CONTROLS = 3  # sigma = 1, gradient energy, random
MIN_STEPS = 10  # of a run; fewer say nothing
_LOSSES = ("loss_start", "loss", "chosen_by")
RUNS_PLANNED = 4  # for each contender: three rates and one beyond the edge


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
    def key(self) -> tuple[str, float, float, int]:
        """What tells a run from the others of the same job."""
        return self.name, self.strength, self.lr, self.seed


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


def steps_of_a_run(budget: int, contenders: int, seeds: int) -> int:
    """Return how many steps (of two forwards) each run may take, so that all of them stay within ``budget``."""
    return budget // (2 * RUNS_PLANNED * contenders * seeds)


def search_rates(
    contenders: Sequence[Contender], run: Callable[[Contender, float, int], Trial], centre: float, seeds: Sequence[int]
) -> list[Trial]:
    """Run every contender at three rates around ``centre``, and at one more beyond where the best is at the edge."""
    trials = []
    for contender in contenders:
        own = [run(contender, centre * FACTOR**k, seed) for k in (-1, 0, 1) for seed in seeds]
        best = best_rate(own)
        edges = {min(trial.lr for trial in own): 1 / FACTOR, max(trial.lr for trial in own): FACTOR}
        if best in edges:
            own += [run(contender, best * edges[best], seed) for seed in seeds]
        trials += own
    return trials


def best_rate(trials: Sequence[Trial]) -> float:
    """Return the rate with the lowest mean loss on the rows that choose; a run that diverged loses."""
    rates = sorted({trial.lr for trial in trials})
    return min(rates, key=lambda lr: _mean(trial.chosen_by for trial in trials if trial.lr == lr))


def judge(trials: Sequence[Trial], *, select_strength: bool, where: str) -> Verdict:
    """Return the verdict on the tuner: its strength, its rate, and a sentence on how it compares.

    Args:
        trials: all runs, among them those called ``tuner`` and ``mezo``.
        select_strength: whether the card may ship another strength than 1.
        where: the rows that are reported, in words.
    """
    best = _best_of_each(trials)
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
        f"{', '.join([_told(label, best[tuner]), *lines])}. {outcome}"
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


def _best_of_each(trials: Sequence[Trial]) -> dict[tuple[str, float], list[Trial]]:
    """The runs of every contender at its best rate."""
    groups: dict[tuple[str, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.name, trial.strength), []).append(trial)
    return {key: [t for t in group if t.lr == best_rate(group)] for key, group in groups.items()}


def _told(name: str, trials: Sequence[Trial]) -> str:
    return f"{name} {_mean(trial.loss for trial in trials):.4f} (lr {trials[0].lr:.2g})"


def _mean(values: Any) -> float:
    """The mean; infinite if one of the values is not finite."""
    found = list(values)
    return sum(found) / len(found) if all(map(math.isfinite, found)) else math.inf


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
