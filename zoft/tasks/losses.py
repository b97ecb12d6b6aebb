"""The training loss of a batch, micro-batch by micro-batch: from the log-probabilities of its choices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import torch

from zoft.tasks.batches import (
    Batch,
    HostBatch,
    PaddedRows,
    arrange,
    fits,
    host_batch,
    length_step,
    readable_filler,
    trees_of,
)
from zoft.tasks.logits import target_log_probs
from zoft.tasks.packing import packable
from zoft.tasks.sharing import Sharing, sharing
from zoft.tasks.types import Encoded, Task, Weighted

Objective = Callable[[Any, Sequence[Encoded]], Weighted]  # of a model and examples; to be minimised


class TrainingLoss:
    """The training loss of a task: ``(model, encoded) -> Weighted``, differentiable.

    The last host batch is kept: both ends of a probe read the same one.
    """

    def __init__(self, task: Task, filler: int) -> None:
        self.task, self.filler = task, filler
        self._last: tuple[tuple[Any, ...], Sequence[Encoded], HostBatch] | None = None

    def __call__(self, model: Any, encoded: Sequence[Encoded]) -> Weighted:
        """Return the loss of ``encoded``, without waiting for the device."""
        found = self.sharing(model, encoded)
        if found.joins(row for one in encoded for row in one.loss_rows):
            return loss(model, self.task, self.host_batch(model, encoded).to(model.device))
        filler = readable_filler(self.filler, model)
        batch = host_batch(encoded, filler).to(model.device)
        return weighted(self.task, *_separate_sums(model, encoded, filler, found), batch)

    def sharing(self, model: Any, encoded: Sequence[Encoded]) -> Sharing:
        """Return which rows may share a batch of ``model``."""
        return sharing(model, (row for one in encoded for row in one.loss_rows), readable_filler(self.filler, model))

    def host_batch(self, model: Any, encoded: Sequence[Encoded]) -> HostBatch:
        """Return ``encoded`` as rows that ``model`` can read, in host memory."""
        settings = (length_step(model.dtype), packable(model))
        key = (*settings, *map(id, encoded))
        if self._last is None or self._last[0] != key:
            # The examples are kept, so that no others can get their ids.
            self._last = key, list(encoded), host_batch(encoded, readable_filler(self.filler, model), *settings)
        return self._last[2]


def losses_of(objective: Objective, model: Any, batch: Sequence[Encoded], count: int) -> Iterator[Weighted]:
    """Yield the objective on ``count`` micro-batches of ``batch``, evaluated lazily."""
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
    """Return `mean` without a gradient, keeping no part and not waiting for the device."""
    total, weight = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        total, weight = part.total.detach() + total, weight + part.weight
    return total / weight


def backward(parts: Iterable[Weighted], parameters: Sequence[torch.nn.Parameter]) -> float:
    """Compute the gradient of the mean over all ``parts`` into the ``grad`` of ``parameters``; return that mean.

    Each part is freed by its backward pass, so only one is in memory. The sums are differentiated and the gradient is
    divided at the end, when the weight is known.
    """
    total, weight = 0.0, 0
    for part in parts:
        part.total.backward()
        total, weight = total + float(part.total.detach()), weight + part.weight
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(weight)
    return total / weight


class BatchLoss:
    """The objective on a batch as a closure: its mean, or by `parts` its micro-batches, for gradients of the head."""

    def __init__(self, losses: Callable[[], Iterable[Weighted]]) -> None:
        self._losses = losses

    def __call__(self) -> torch.Tensor:
        """Return the mean, without a gradient."""
        return value(self._losses())

    def parts(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield sum and weight of each micro-batch, in the graph of autograd."""
        for part in self._losses():
            yield part.total, part.weight


def loss(model: torch.nn.Module, task: Task, batch: Batch) -> Weighted:
    """Return the training loss of a batch, differentiable (arXiv 2305.17333).

    Classification: cross-entropy over the mean log-probabilities of the choices, weighted by examples. Choice,
    generation and text: cross-entropy of the gold tokens, weighted by tokens.
    """
    return weighted(task, *choice_sums(model, batch.rows), batch)


def weighted(task: Task, sums: torch.Tensor, counts: torch.Tensor, batch: Batch) -> Weighted:
    """Return the training loss of a batch from the summed log-probability and the tokens of every choice."""
    if task.kind == "classification":
        return Weighted(choice_cross_entropy(sums / counts, batch).sum(), weight(task, batch))
    return Weighted(-sums[batch.gold].sum(), weight(task, batch))


def weight(task: Task, batch: Batch | HostBatch) -> int:
    """Return the number that the training loss of a batch is divided by: of examples, or of target tokens."""
    return batch.examples if task.kind == "classification" else batch.gold_tokens


def choice_cross_entropy(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy ``(examples,)`` of the gold choice, with the scores ``(choices,)`` of an example as its logits."""
    # One more row takes the choices that pad a batch (`zoft.tasks.buckets`).
    table = scores.new_full((batch.examples + 1, batch.columns), -torch.inf)
    table = table.index_put((batch.example, batch.column), scores)[: batch.examples]
    return torch.logsumexp(table, dim=1) - scores[batch.gold]


def choice_sums(model: torch.nn.Module, rows: PaddedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability (float64) and the number of tokens of every choice, both ``(choices,)``."""
    log_probs = target_log_probs(model, rows).double()
    # A table and a sum along it: indexed addition is not deterministic on a GPU.
    table = log_probs.new_zeros(len(rows.counts), rows.most)
    return table.index_put((rows.segment, rows.place), log_probs).sum(dim=1), rows.counts


def _separate_sums(
    model: Any, encoded: Sequence[Encoded], filler: int, shared: Sharing
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `choice_sums`, in the order of `host_batch`, from a forward pass for each group of rows."""
    rows = [(b, row) for b, one in enumerate(encoded) for row in one.loss_rows]
    starts = [0, *accumulate(len(row.targets) for _, row in rows)]
    longest, step = packable(model), shared.step(model.dtype)
    sums, counts, order = [], [], []
    for members in shared.groups(range(len(rows)), lambda i: len(rows[i][1].ids)):
        packed = fits([rows[i][1] for i in members], longest)
        examples = [[rows[i][1] for i in one] for _, one in groupby(members, lambda i: rows[i][0])]
        trees = [tree for one in examples for tree in trees_of(one, packed)]
        found = choice_sums(model, arrange(trees, filler, model.device, step, packed))
        sums.append(found[0])
        counts.append(found[1])
        order += [choice for i in members for choice in range(starts[i], starts[i + 1])]
    places = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=sums[0].device)
    return torch.cat(sums)[places], torch.cat(counts)[places]
