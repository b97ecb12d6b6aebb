"""How trials are planned and judged: best rates, strengths, edges, divergence."""

import math
from dataclasses import replace

import pytest

from zoft.metatrain.evidence import (
    Contender,
    Rounds,
    Trial,
    compete,
    evidence_rows,
    judge,
    rounds_within,
    trial_of,
    trial_row,
)
from zoft.registry import Evidence
from zoft.tuner.networks import PertNN


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
    assert Evidence([trial("mezo", math.nan, lr=1e-4), trial("mezo", 0.9, lr=1e-5)]).best_rate() == 1e-5
    # and a rate that diverges with one seed of two is worse than one that holds:
    both = [trial("m", 0.1, lr=1e-4), trial("m", math.nan, lr=1e-4, seed=2), trial("m", 0.9), trial("m", 0.9, seed=2)]
    assert Evidence(both).best_rate() == 1e-5
    verdict = judge([trial("tuner", math.nan), *CONTROLS], select_strength=True, where="")
    assert verdict.strength == 0.0


def landscape(optimum: dict[str, float], seen: list[tuple[str, float, int, int]]):
    """Runs whose loss grows with the distance of their rate from an optimum that falls with the root of the steps."""

    def run(contender: Contender, lr: float, seed: int, steps: int) -> Trial:
        seen.append((contender.label, lr, seed, steps))
        best = optimum[contender.label] * (ROUNDS.first / steps) ** 0.5
        loss = 0.1 * math.log(lr / best, 3) ** 2 + (0.3 if contender.label == "energy" else 0.2)
        return Trial(contender.name, contender.strength, lr, seed, 2 * steps, 1.0, loss, loss, None, None)

    return run


ROUNDS = Rounds(first=10, second=90, runs=21)
CONTENDERS = [
    Contender("tuner", PertNN(["a"])),
    Contender("tuner", PertNN(["a"]), strength=0.5),
    *(Contender(name, PertNN(["a"])) for name in ("mezo", "energy", "random")),
]


def test_the_second_round_has_the_finalists_at_rates_for_its_length() -> None:
    seen: list[tuple[str, float, int, int]] = []
    optimum = {"tuner": 9e-5, "tuner^0.5": 3e-5, "mezo": 1e-5, "energy": 3e-5, "random": 3e-5}
    trials = compete(CONTENDERS, landscape(optimum, seen), 3e-5, [1, 2], ROUNDS)
    assert len(trials) == len(seen) == 2 * (3 * 5 + 2 * 3)
    first = {(name, round(lr * 1e5)) for name, lr, _, steps in seen if steps == 10}
    assert first == {(one.label, rate) for one in CONTENDERS for rate in (1, 3, 9)}
    second: dict[str, set[float]] = {}
    for name, lr, _, steps in seen:
        if steps == 90:
            second.setdefault(name, set()).add(float(f"{lr:.3g}"))
    # Nine times as long: a third of the rate that was best at first, and a third of that.
    assert second == {"tuner": {3e-5, 1e-5}, "mezo": {3.33e-6, 1.11e-6}, "random": {1e-5, 3.33e-6}}


def test_the_verdict_and_the_rate_come_from_the_second_round() -> None:
    seen: list[tuple[str, float, int, int]] = []
    optimum = dict.fromkeys(("tuner", "tuner^0.5", "mezo", "energy", "random"), 3e-5)
    trials = compete(CONTENDERS, landscape(optimum, seen), 3e-5, [1], ROUNDS)
    verdict = judge(trials, select_strength=True, where="10 rows")
    assert verdict.lr == pytest.approx(1e-5)
    assert "180 forwards from loss" in verdict.text
    assert verdict.text.split("Behind after ")[1].startswith("20 forwards: tuner^0.5, energy.")


def test_a_first_round_cannot_make_a_tuner_win() -> None:
    short = [trial("tuner", 0.1), trial("mezo", 0.9), trial("random", 0.9)]
    long = [replace(t, forwards=400, loss=x, chosen_by=x) for t, x in zip(short, (0.5, 0.4, 0.6), strict=True)]
    verdict = judge([*short, *long], select_strength=True, where="")
    assert verdict.strength == 0 and "mezo did better" in verdict.text


def test_all_go_on_from_a_first_round_in_which_all_diverged() -> None:
    def run(contender: Contender, lr: float, seed: int, steps: int) -> Trial:
        return Trial(contender.name, contender.strength, lr, seed, 2 * steps, 1.0, math.nan, math.nan, None, None)

    trials = compete(CONTENDERS, run, 3e-5, [1], ROUNDS)
    last = Evidence(trials).longest().runs
    assert len(last) == 6 and min(trial.lr for trial in last) < 1.2e-6


@pytest.mark.parametrize("budget", [540, 600, 1066, 5000, 100_000])
@pytest.mark.parametrize(("contenders", "seeds"), [(5, 1), (4, 1), (5, 3)])
def test_the_rounds_stay_within_the_budget(budget: int, contenders: int, seeds: int) -> None:
    rounds = rounds_within(budget, contenders, seeds)
    if rounds is None:
        assert 2 * seeds * (10 * 3 * contenders + 21 * 6) > budget
        return
    used = 2 * seeds * (rounds.first * 3 * contenders + rounds.second * 6)
    assert budget - 12 * seeds < used <= budget
    assert rounds.second >= 2 * rounds.first >= 20
    assert rounds.runs == seeds * (3 * contenders + 6)
    if budget >= 5000:
        assert rounds.second >= 4 * rounds.first, "most of it goes to the second round"


def test_a_trial_survives_the_way_through_a_file() -> None:
    for one in (trial("tuner", 0.5), trial("mezo", math.nan)):
        assert repr(trial_of(trial_row(one))) == repr(one)
    assert trial_row(trial("mezo", math.inf))["loss"] is None


def test_a_card_keeps_every_run() -> None:
    rows = evidence_rows([trial("tuner", 0.5, strength=0.5), trial("mezo", math.nan)], task="t", split="s", eps=1e-3)
    assert [(row.name, row.loss) for row in rows] == [("tuner^0.5", 0.5), ("mezo", None)]


def test_a_damaged_row_is_no_trial() -> None:
    """Its run is repeated; rows of 0.1 have no checksum."""
    row = trial_row(trial("mezo", 0.8, chosen_by=0.7))
    assert trial_of(row) == trial("mezo", 0.8, chosen_by=0.7)
    old = {key: value for key, value in row.items() if key != "crc32"}
    assert trial_of(old) == trial_of(row)
    damages = [{"loss": 0.1}, {"crc32": 1}, {"seed": 2}, {"extra": 1}]
    assert all(trial_of(row | damage) is None for damage in damages)
    damages = [{"loss": "0.1"}, {"name": None}, {"lr": [1]}, {"extra": 1}]
    assert all(trial_of(old | damage) is None for damage in damages)
    assert trial_of({}) is None and trial_of({"name": "mezo"}) is None
