"""How trials are planned and judged: best rates, strengths, edges, divergence."""

import math

import pytest

from zoft.metatrain.evidence import (
    Contender,
    Trial,
    best_rate,
    evidence_rows,
    judge,
    search_rates,
    steps_of_a_run,
    trial_of,
    trial_row,
)
from zoft.pertnn import PertNN


def trial(name: str, loss: float, lr: float = 1e-5, strength: float = 1.0, chosen_by: float | None = None, seed=1):
    chosen = loss if chosen_by is None else chosen_by
    return Trial(name, strength, lr, seed, 40, 1.0, loss, chosen, 0.5, "accuracy")


CONTROLS = [trial("mezo", 0.8), trial("energy", 0.75), trial("random", 0.9)]


def test_the_tuner_wins_where_it_beats_every_control() -> None:
    verdict = judge([trial("tuner", 0.7), *CONTROLS], select_strength=True, where="10 rows")
    assert (verdict.strength, verdict.lr) == (1.0, 1e-5)
    assert verdict.text.endswith("The tuner wins.")
    assert "On 10 rows, 40 forwards from loss 1.0000" in verdict.text and "tuner 0.7000 (lr 1e-05)" in verdict.text


def test_it_is_said_plainly_who_did_better() -> None:
    verdict = judge([trial("tuner", 0.77), *CONTROLS], select_strength=True, where="10 rows")
    assert verdict.text.endswith("The tuner does NOT win: energy did better.") and verdict.strength == 1.0


def test_a_card_never_ships_a_tuner_that_loses_to_mezo() -> None:
    verdict = judge(
        [trial("tuner", 0.81), trial("tuner", 0.85, strength=0.5), *CONTROLS[:1]], select_strength=True, where=""
    )
    assert verdict.strength == 0.0 and verdict.lr == 1e-5 and "ships strength 0, which is MeZO" in verdict.text
    kept = judge([trial("tuner", 0.81), *CONTROLS], select_strength=False, where="")
    assert kept.strength == 1.0 and "does NOT win" in kept.text


def test_strength_and_rate_are_chosen_on_other_rows_than_the_reported() -> None:
    trials = [
        trial("tuner", 0.1, lr=1e-5, chosen_by=0.9),
        trial("tuner", 0.6, lr=3e-5, chosen_by=0.5),
        trial("tuner", 0.2, lr=1e-5, strength=0.5, chosen_by=0.4),
        *CONTROLS,
    ]
    verdict = judge(trials, select_strength=True, where="")
    assert (verdict.strength, verdict.lr) == (0.5, 1e-5)
    assert judge(trials, select_strength=False, where="").lr == 3e-5


def test_a_run_that_diverged_loses() -> None:
    assert best_rate([trial("mezo", math.nan, lr=1e-4), trial("mezo", 0.9, lr=1e-5)]) == 1e-5
    # and a rate that diverges with one seed of two is worse than one that holds:
    both = [trial("m", 0.1, lr=1e-4), trial("m", math.nan, lr=1e-4, seed=2), trial("m", 0.9), trial("m", 0.9, seed=2)]
    assert best_rate(both) == 1e-5
    verdict = judge([trial("tuner", math.nan), *CONTROLS], select_strength=True, where="")
    assert verdict.strength == 0.0


@pytest.mark.parametrize(
    ("optimum", "rates"), [(0, [-1, 0, 1]), (1, [-1, 0, 1, 2]), (-1, [-2, -1, 0, 1]), (5, [-1, 0, 1, 2])]
)
def test_the_search_goes_one_further_where_the_best_is_at_the_edge(optimum: int, rates: list[int]) -> None:
    def run(contender: Contender, lr: float, seed: int) -> Trial:
        return trial(contender.name, (math.log(lr / 1e-5, 3) - optimum) ** 2, lr=lr, seed=seed)

    found = search_rates([Contender("tuner", PertNN(["a"]))], run, 1e-5, [1, 2])
    assert sorted({t.lr for t in found}) == pytest.approx([1e-5 * 3.0**k for k in rates])
    assert len(found) == 2 * len(rates)


def test_all_runs_together_stay_within_the_budget() -> None:
    assert steps_of_a_run(1000, contenders=5, seeds=2) * 2 * 4 * 5 * 2 <= 1000


def test_a_trial_survives_the_way_through_a_file() -> None:
    for one in (trial("tuner", 0.5), trial("mezo", math.nan)):
        assert repr(trial_of(trial_row(one))) == repr(one)
    assert trial_row(trial("mezo", math.inf))["loss"] is None


def test_a_card_keeps_every_run() -> None:
    rows = evidence_rows([trial("tuner", 0.5, strength=0.5), trial("mezo", math.nan)], task="t", split="s", eps=1e-3)
    assert [(row.name, row.loss) for row in rows] == [("tuner^0.5", 0.5), ("mezo", None)]
