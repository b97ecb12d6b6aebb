"""Means, intervals and wins against closed forms and published tables."""

import math

import pytest

from zoft.compare.statistics import duel, estimate, firsts, student_cdf, student_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (29, 2.045), (30, 2.042)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=5e-4)
    assert student_cdf(student_quantile(0.975, freedom), freedom) == pytest.approx(0.975, abs=1e-12)


def test_one_and_two_degrees_of_freedom_have_closed_forms():
    for t in (-3.0, -0.2, 0.0, 0.7, 12.0):
        assert student_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-14)
        assert student_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-14)


def test_an_estimate_is_mean_spread_and_half_an_interval():
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.count == 3
    spread = math.sqrt(7 / 3)  # deviations -4/3, -1/3, 5/3: 42/9 over n - 1
    assert found.spread == pytest.approx(spread)
    assert found.half == pytest.approx(4.302653 * spread / math.sqrt(3), rel=1e-6)


def test_what_cannot_be_estimated_is_none():
    assert (estimate([0.5]).spread, estimate([0.5]).half) == (None, None)
    assert estimate([0.5, math.inf]).mean == math.inf and estimate([0.5, math.inf]).half is None


def test_wins_count_ties_for_both_and_places_of_two_or_more():
    scores = {"a": {"x": 1.0, "y": 3.0}, "b": {"x": 1.0, "y": 2.0, "z": 9.0}, "c": {"x": -math.inf}}
    assert firsts(scores) == {"a": (2, 2), "b": (1, 2), "c": (0, 1)}
    assert duel(scores, "a", "b") == (1, 1, 0) and duel(scores, "b", "a") == (0, 1, 1)
    assert duel(scores, "c", "a") == (0, 0, 1)
