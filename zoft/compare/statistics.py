"""Mean, spread and confidence interval of a few numbers; wins of methods against each other."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Mean, sample standard deviation and half the width of Student's 95 % interval of the mean of ``count`` numbers.

    A single number has neither spread nor interval.
    """

    mean: float
    spread: float | None
    half: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, spread and interval of ``values`` (at least one).

    >>> found = estimate([1.0, 2.0, 3.0])
    >>> found.mean, found.spread, round(found.half, 3)  # 4.303 / sqrt(3)
    (2.0, 1.0, 2.484)
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1 or not all(map(math.isfinite, values)):
        return Estimate(mean, None, None, count)
    spread = statistics.stdev(values)
    return Estimate(mean, spread, student_quantile(0.5 + CONFIDENCE / 2, count - 1) * spread / math.sqrt(count), count)


def student_cdf(t: float, freedom: int) -> float:
    """Return Student's distribution function, by the finite sums for whole degrees of freedom (Abramowitz 26.7.3-4).

    >>> round(student_cdf(1.0, 1), 6)  # 1/2 + arctan(1) / pi
    0.75
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = total = cosine if odd else 1.0
    if freedom == 1:
        total = 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    within = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return (1 + within) / 2


def student_quantile(probability: float, freedom: int) -> float:
    """Return ``t`` with ``student_cdf(t, freedom) == probability`` (at least 1/2), by halving an interval.

    >>> round(student_quantile(0.975, 4), 3)
    2.776
    """
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


Scores = Mapping[str, Mapping[str, float]]  # method -> (model and task) -> score, the larger the better


def firsts(scores: Scores) -> dict[str, tuple[int, int]]:
    """Return for every method on how many places it is the best, ties included, and on how many it was run.

    Only places with at least two methods are counted.

    >>> firsts({"a": {"x": 2, "y": 1, "z": 5}, "b": {"x": 1, "y": 1}})
    {'a': (2, 2), 'b': (1, 2)}
    """
    places: dict[str, dict[str, float]] = {}
    for method, found in scores.items():
        for place, score in found.items():
            places.setdefault(place, {})[method] = score
    shared = [one for one in places.values() if len(one) > 1]
    return {
        method: (
            sum(one[method] == max(one.values()) for one in shared if method in one),
            sum(method in one for one in shared),
        )
        for method in scores
    }


def duel(scores: Scores, ours: str, theirs: str) -> tuple[int, int, int]:
    """Return on how many places ``ours`` beats ``theirs``, draws, and loses.

    >>> duel({"a": {"x": 2, "y": 1, "z": 5}, "b": {"x": 1, "y": 1}}, "a", "b")
    (1, 1, 0)
    """
    pairs = [(scores[ours][place], scores[theirs][place]) for place in scores[ours] if place in scores[theirs]]
    won, drawn = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    return won, drawn, len(pairs) - won - drawn
