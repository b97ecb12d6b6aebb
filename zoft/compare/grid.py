"""Grids of learning rates: the published ones, and how they grow while the best rate is at an edge."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from zoft import registry
from zoft.compare.config import MethodSpec
from zoft.deploy.choice import AUTO
from zoft.model.adapters import Mode
from zoft.optim import get_method

FACTOR = 3.0  # from a rate to the next beyond an edge
STILL = 0.01  # a rate that moved the loss by less than this share was too small

# Published grids for causal models. Of a method that is not here, the published default and its neighbours are tried.
_ZO_BENCH = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)  # arXiv 2402.11592, OPT-13B
PUBLISHED: dict[Mode, dict[str, tuple[float, ...]]] = {
    "full": {
        "mezo": (1e-7, 1e-6),  # arXiv 2305.17333, OPT
        "adam": (1e-5, 5e-5),  # the same, first-order rows
        **dict.fromkeys(("lozo", "lozo-m"), (1e-7, 1e-6)),  # arXiv 2410.07698
        **dict.fromkeys(("dizo", "dizo-fo"), (5e-7, 1e-6)),  # arXiv 2502.03304
        **dict.fromkeys(("mezo-momentum", "mezo-adam", "zo-sign", "zo-conservative"), _ZO_BENCH),
    },
    "lora": {"mezo": (5e-5, 1e-4)},  # arXiv 2305.17333, OPT
    "prefix": {"mezo": (1e-3, 1e-2)},
}

P = TypeVar("P", bound=Any)


def raised(rate: float) -> float:
    """Return the next rate above, three digits long.

    >>> raised(1e-06), lower(1e-06)
    (3e-06, 3.33e-07)
    """
    return float(f"{rate * FACTOR:.3g}")


def lower(rate: float) -> float:
    """Return the next rate below, three digits long."""
    return float(f"{rate / FACTOR:.3g}")


def first_rates(spec: MethodSpec, common: Sequence[float] | None, mode: Mode = "full") -> tuple[float, ...]:
    """Return the rates that ``spec`` is tried at first: its own, the comparison's, a tuner card's, the published ones.

    ``mode`` says whether these are for all weights or for adapters.

    >>> first_rates(MethodSpec(method="mezo"), None)
    (1e-07, 1e-06)
    """
    if given := spec.lr or common:
        return tuple(sorted(set(given)))
    if spec.tuner not in (None, AUTO):
        recommended = registry.open_card(str(spec.tuner)).metadata.recommended.lr
        if recommended is not None:
            return _around(recommended)
    name = "mezo" if get_method(spec.method).tuned else spec.method
    return PUBLISHED[mode].get(name) or _around(get_method(name).published(mode)[0])


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
    """Return the places of a grid that are needed so far, those that are done among them.

    The ``first`` ones, then, whenever all are done, one more beyond the best while that is at an edge, at most ``most``
    at each end. The largest rate must have moved the loss, and below one that has not there is nothing to try.

    Args:
        first: places in any order; larger ones have larger rates.
        mean: what a place is judged by, the lower the better; None while it is not done.
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
