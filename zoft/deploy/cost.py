"""What steps cost in forward passes: the unit in which methods are compared."""

from zoft.optim import Method
from zoft.optim.first_order import FORWARDS


def forwards_of(method: Method, probes: int, steps: int) -> int:
    """Return the forward passes of the first ``steps`` steps of a run; a backward pass counts two.

    >>> from zoft.optim import get_method
    >>> forwards_of(get_method("mezo"), 4, 10), forwards_of(get_method("adam"), 1, 10)
    (80, 30)
    """
    return steps * (FORWARDS if method.first_order else 2 * probes)


def steps_within(method: Method, probes: int, budget: int) -> int:
    """Return the most steps that take no more than ``budget`` forward passes; 0 where one step takes more.

    >>> from zoft.optim import get_method
    >>> steps_within(get_method("adam"), 1, 100)
    33
    """
    low, high = 0, budget  # a step takes at least one
    while low < high:
        middle = (low + high + 1) // 2
        if forwards_of(method, probes, middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
