"""Loss, metric and predictions of a model on encoded examples."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from zoft.errors import DataError
from zoft.tasks.batches import arrange, fits, pad_id, readable_filler, trees_of
from zoft.tasks.generate import generate
from zoft.tasks.losses import choice_sums
from zoft.tasks.packing import packable
from zoft.tasks.sharing import sharing
from zoft.tasks.types import Encoded, Evaluation, Row, Task

Progress = Callable[[int, int], None]
T = TypeVar("T")

MAX_TOKENS = 16_384  # in one batch, padding included: bounds the memory of long rows


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    encoded: Sequence[Encoded],
    *,
    batch_size: int,
    generating: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Return loss, metric and predictions of ``model`` on ``encoded`` (not empty).

    Deterministic; ``batch_size`` limits the rows read at once and changes memory and speed, not scores. Generating
    text takes many times as long as the loss: with ``generating=False`` the metric is None and the predictions are
    empty. ``progress(done, total)`` counts rows.
    """
    if not encoded:
        raise DataError(f"nothing to evaluate: the split of {task.name} has no rows")
    predicting = generating or task.kind != "generation"
    rows = sum(len(one.rows) for one in encoded)
    steps = _Counter(rows + (len(encoded) if predicting and task.kind == "generation" else 0), progress)
    with evaluating(model):
        scores = choice_scores(model, encoded, pad_id(tokenizer), batch_size, steps)
        predictions = predict(model, tokenizer, task, encoded, scores, batch_size, steps) if predicting else []
    value = mean_loss(task, encoded, scores)
    return Evaluation(
        loss=value,
        metric=main_metric(task, encoded, predictions, value) if predicting else None,
        metric_name=task.metric,
        examples=len(encoded),
        tokens=sum(len(row.ids) for one in encoded for row in one.rows),
        predictions=tuple(predictions),
    )


@dataclass(frozen=True)
class Scores:
    """Summed log-probabilities and token counts of an example's choices."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def means(self) -> list[float]:
        """Mean log-probability of each choice."""
        return [total / count for total, count in zip(self.sums, self.counts, strict=True)]

    @property
    def are_numbers(self) -> bool:
        """Whether none of the sums is NaN, which compares with nothing."""
        return not any(map(math.isnan, self.sums))


def choice_scores(
    model: Any,
    encoded: Sequence[Encoded],
    filler: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Scores]:
    """Return the scores of every choice of every example, in the order of ``encoded``."""
    found: list[dict[int, tuple[float, int]]] = [{} for _ in encoded]
    longest, filler = packable(model), readable_filler(filler, model)
    shared = sharing(model, (row for one in encoded for row in one.rows), filler)
    for packed in (True, False):
        chosen = [(i, one.rows) for i, one in enumerate(encoded) if fits(one.rows, longest) is packed]
        joined = [(i, part) for i, rows in chosen for part in shared.groups(rows, lambda row: len(row.ids))]
        jobs = [(i, tree) for i, rows in joined for tree in trees_of(rows, packed)]
        for part in by_length(jobs, lambda job: len(job[1].ids), batch_size, lambda job: shared.key(job[1].length)):
            trees = [tree for _, tree in part]
            rows = arrange(trees, filler, model.device, shared.step(model.dtype), packed)
            sums, counts = choice_sums(model, rows)
            owners = [(i, target.choice) for i, tree in part for target in tree.targets]
            for (i, choice), total, count in zip(owners, sums.tolist(), counts.tolist(), strict=True):
                found[i][choice] = (total, count)
            progress(sum(tree.rows for tree in trees))
    return [Scores(*zip(*(one[k] for k in sorted(one)), strict=True)) for one in found]


def predict(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    encoded: Sequence[Encoded],
    scores: Sequence[Scores],
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Any]:
    """Return the choice with the highest mean log-probability, or the generated text, of every example."""
    if task.kind == "text":
        return []
    if task.kind != "generation":
        return [max(range(len(one.means)), key=one.means.__getitem__) for one in scores]
    texts = [""] * len(encoded)
    shared = sharing(model, (Row(one.prompt_ids, ()) for one in encoded), readable_filler(pad_id(tokenizer), model))

    def length(i: int) -> int:
        return len(encoded[i].prompt_ids) + task.max_new_tokens

    def group(i: int) -> int:  # prompts that may cross a boundary do so together
        return length(i) if shared.key(length(i)) else 0

    for part in by_length(range(len(encoded)), length, batch_size, group):
        for i, text in zip(part, generate(model, tokenizer, task, [encoded[i].prompt_ids for i in part]), strict=True):
            texts[i] = text
        progress(len(part))
    return texts


def mean_loss(task: Task, encoded: Sequence[Encoded], scores: Sequence[Scores]) -> float:
    """Return the training loss over a split: mean over examples for classification, over target tokens otherwise.

    NaN if a score of any choice is, since predictions are made from all of them.
    """
    if not all(one.are_numbers for one in scores):
        return math.nan
    if task.kind == "classification":
        losses = [_cross_entropy(s.means, one.label) for one, s in zip(encoded, scores, strict=True)]
        return math.fsum(losses) / len(losses)
    gold = [(s.sums[one.label], s.counts[one.label]) for one, s in zip(encoded, scores, strict=True)]
    return -math.fsum(total for total, _ in gold) / sum(count for _, count in gold)


def _cross_entropy(logits: Sequence[float], label: int) -> float:
    values = torch.tensor(logits, dtype=torch.float64)
    return float(torch.logsumexp(values, 0) - values[label])


def main_metric(task: Task, encoded: Sequence[Encoded], predictions: Sequence[Any], loss: float) -> float:
    """Return the task's main metric, from 0 to 1, or the perplexity."""
    if task.kind == "text":
        return math.inf if loss > 700 else math.exp(loss)
    return sum(metric_values(task, task.metric, encoded, predictions)) / len(encoded)


def metric_values(task: Task, name: str, encoded: Sequence[Encoded], predictions: Sequence[Any]) -> list[float]:
    """Return the metric ``name`` of every example."""
    pairs = zip(encoded, predictions, strict=True)
    if name == "accuracy":
        return [float(found in (one.label, *one.example.also_right)) for one, found in pairs]
    return [task.scores[name](found, one.example.answers) for one, found in pairs]


def by_length(
    items: Sequence[T], length: Callable[[T], int], batch_size: int, group: Callable[[T], int] = lambda _: 0
) -> Iterator[list[T]]:
    """Yield ``items`` longest first, in lists of at most ``batch_size`` items and `MAX_TOKENS` tokens (or one item).

    The items of a list are of one ``group``.
    """
    ordered = sorted(items, key=lambda item: (group(item), length(item)), reverse=True)
    while ordered:
        count = max(1, min(batch_size, MAX_TOKENS // length(ordered[0])))
        _, first = next(groupby(ordered[:count], group))
        taken = list(first)
        yield taken
        ordered = ordered[len(taken) :]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put ``model`` in evaluation mode, without gradients; restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class _Counter:
    """Add up counts and report the total to a listener."""

    def __init__(self, total: int, progress: Progress | None):
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)
