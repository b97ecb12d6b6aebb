"""Cost of steps in forward passes, the unit in which methods are compared, before they are taken."""

from collections.abc import Mapping
from typing import Any

from zoft.optim import Method


def forwards_of(
    method: Method, probes: int, steps: int, options: Mapping[str, Any] | None = None, whole: float = 1.0
) -> float:
    """Return the forward passes of the first ``steps`` steps of a run; a backward pass counts two.

    ``options`` are those of the method; ``whole`` is the cost of a pass over all training examples, n / B.

    >>> from zoft.optim import get_method
    >>> forwards_of(get_method("mezo"), 4, 10), forwards_of(get_method("adam"), 1, 10)
    (80, 30)
    >>> forwards_of(get_method("dizo"), 1, 100, {"cycle": 50, "inner": 10})
    240
    """
    return method.forwards(probes, steps, options or {}, whole)


def steps_within(
    method: Method, probes: int, budget: int, options: Mapping[str, Any] | None = None, whole: float = 1.0
) -> int:
    """Return the largest number of steps within ``budget`` forward passes; 0 where one step takes more.

    >>> from zoft.optim import get_method
    >>> steps_within(get_method("adam"), 1, 100)
    33
    """
    low, high = 0, budget  # a step takes at least one
    while low < high:
        middle = (low + high + 1) // 2
        if forwards_of(method, probes, middle, options, whole) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
