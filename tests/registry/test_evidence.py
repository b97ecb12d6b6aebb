"""Evidence: rounds, best rates, best runs and gains of contenders."""

import math

import pytest

from zoft.registry import Evidence, EvidenceRow, mean


def row(name: str, loss: float | None, lr: float = 1e-5, **changes: object) -> EvidenceRow:
    shared = {"task": "t", "split": "dev", "eps": 1e-3, "forwards": 40, "seed": 0, "loss_start": 1.0}
    return EvidenceRow(**{"name": name, "loss": loss, "lr": lr} | shared | changes)


def test_the_last_round_is_that_of_each_task() -> None:
    rows = [row("mezo", 0.5), row("mezo", 0.4, forwards=80), row("mezo", 0.3, task="other", forwards=60)]
    assert Evidence(rows).longest().runs == tuple(rows[1:])
    assert Evidence([]).longest().runs == ()


def test_the_best_run_is_that_of_each_contender_task_and_seed() -> None:
    rows = [row("tuner", None), row("tuner", 0.5, 3e-5), row("mezo", None), row("mezo", None, 3e-5)]
    rows += [row("tuner", 0.1, seed=1), row("tuner", 0.2, task="other")]
    assert Evidence(rows).best() == [rows[1], rows[2], rows[4], rows[5]]


def test_a_rate_is_judged_by_the_mean_over_seeds() -> None:
    evidence = Evidence([row("mezo", 0.8), row("mezo", 0.8, seed=1), row("mezo", 0.1, 3e-5), row("mezo", None, 3e-5)])
    assert evidence.best_rate() == 1e-5 and evidence.at_best_rate().runs == evidence.runs[:2]


def test_a_gain_is_a_mean_over_pairs_that_both_ended() -> None:
    rows = [row("mezo", 0.9), row("tuner", 0.5), row("tuner", 0.6, 3e-5)]
    rows += [row("mezo", 0.5, seed=1), row("tuner", 0.3, seed=1), row("mezo", 0.1, seed=2), row("tuner", None, seed=2)]
    assert Evidence(rows).gain("tuner") == pytest.approx((0.4 + 0.2) / 2)
    assert Evidence(rows).gain("mezo") == 0 and Evidence(rows).gain("energy") is None
    assert Evidence(rows).gain("mezo", over="tuner") == pytest.approx(-0.3)


def test_a_mean_with_a_value_that_is_not_finite_is_infinite() -> None:
    assert mean([1.0, 2.0]) == 1.5 and mean([1.0, math.nan]) == mean([-math.inf]) == math.inf
