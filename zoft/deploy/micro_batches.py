"""A batch in micro-batches: its value, or its gradient for the first-order bounds."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from zoft.tasks import Encoded, Weighted
from zoft.tasks.objectives import Objective


def parts_of(objective: Objective, model: Any, batch: Sequence[Encoded], count: int) -> Iterator[Weighted]:
    """Yield the objective on ``count`` micro-batches of ``batch``, each evaluated when its turn comes."""
    for part in micro_batches(batch, count):
        yield objective(model, part)


def micro_batches(batch: Sequence[Encoded], count: int) -> list[Sequence[Encoded]]:
    """Return ``batch`` in ``count`` parts, or fewer, all of one size but the last."""
    size = -(-len(batch) // count)
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def mean(parts: Iterable[Weighted]) -> torch.Tensor:
    """Return the mean over all ``parts``, whose sums are added in float64."""
    first, *rest = parts
    return sum(rest, start=first).value


def value(parts: Iterable[Weighted]) -> torch.Tensor:
    """Return `mean` without a gradient; no part is kept, and the host waits for none."""
    total, weight = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        total, weight = part.total.detach() + total, weight + part.weight
    return total / weight


def backward(parts: Iterable[Weighted], parameters: Sequence[torch.nn.Parameter]) -> float:
    """Leave the gradient of the mean over all ``parts`` with ``parameters``, and return that mean.

    Each part is freed by its backward pass, so that only one is in memory. Raw sums are differentiated; the number that
    divides them is known only at the end.
    """
    total, weight = 0.0, 0
    for part in parts:
        part.total.backward()
        total, weight = total + float(part.total.detach()), weight + part.weight
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(weight)
    return total / weight
