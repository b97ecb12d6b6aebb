"""Grids of learning rates: published ones, and how a grid grows while its best rate is at an edge."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from zoft.compare.config import MethodSpec
from zoft.model.adapters import Mode
from zoft.optim import get_method

FACTOR = 3.0  # from a rate to the next beyond an edge
STILL = 0.01  # a rate that moved the loss by less than this share was too small

P = TypeVar("P", bound=Any)


def raised(rate: float) -> float:
    """Return the next larger rate, rounded to three digits.

    >>> raised(1e-06), lower(1e-06)
    (3e-06, 3.33e-07)
    """
    return float(f"{rate * FACTOR:.3g}")


def lower(rate: float) -> float:
    """Return the next smaller rate, rounded to three digits."""
    return float(f"{rate / FACTOR:.3g}")


def first_rates(
    spec: MethodSpec, common: Sequence[float] | None, mode: Mode = "full", recommended: float | None = None
) -> tuple[float, ...]:
    """Return the first learning rates of ``spec``: its own, the comparison's, a card's, or the published ones.

    Args:
        spec: the method.
        common: the comparison's rates for methods without their own.
        mode: which published rates: those for all weights, LoRA or prefixes.
        recommended: the rate that the tuner card of ``spec`` recommends.

    >>> first_rates(MethodSpec(method="mezo"), None)
    (1e-07, 1e-06)
    """
    if given := spec.lr or common:
        return tuple(sorted(set(given)))
    if recommended is not None:
        return _around(recommended)
    name = "mezo" if get_method(spec.method).tuned else spec.method
    published = get_method(name).settings(mode)
    return published.grid or _around(published.lr)


def _around(rate: float) -> tuple[float, ...]:
    return (lower(rate), float(f"{rate:.3g}"), raised(rate))


def needed(
    first: Sequence[P],
    mean: Callable[[P], float | None],
    *,
    moved: Callable[[P], bool],
    up: Callable[[P], P],
    down: Callable[[P], P],
    most: int,
) -> list[P]:
    """Return the places of a grid that are needed so far, finished ones included.

    First the ``first`` ones; whenever all are done and the best is at an edge, one more beyond it, at most ``most`` at
    each end. The grid also grows upwards while its largest rate has not moved the loss, and never downwards from a
    rate that has not.

    Args:
        first: places in any order; larger ones have larger rates.
        mean: score of a place, the lower the better; None while it is not done.
        moved: whether the runs of a place moved the loss at all.
        up, down: the place beyond another.
        most: places added at each end at most.
    """
    places = list(first)
    above = below = 0
    while all(mean(place) is not None for place in places):
        ordered = sorted(places)
        best = min(ordered, key=lambda place: mean(place) or 0.0)
        if best == ordered[-1] or not moved(ordered[-1]):
            above += 1
            beyond = up(ordered[-1])
        elif best == ordered[0] and moved(ordered[0]):
            below += 1
            beyond = down(ordered[0])
        else:
            break
        if max(above, below) > most:
            break
        places.append(beyond)
    return places
