"""Objectives that a step can minimise: the training loss, one minus a metric, or a user's function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from zoft.errors import ConfigError
from zoft.tasks.batches import pad_id
from zoft.tasks.evaluate import choice_scores, evaluating, metric_values, predict
from zoft.tasks.losses import Objective, TrainingLoss
from zoft.tasks.types import Encoded, Task, Weighted


def objective(
    name: str | Callable[[Any, Sequence[Encoded]], float],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
) -> Objective:
    """Return the objective ``name``, a function ``(model, encoded) -> Weighted`` to be minimised.

    ``"loss"`` is the training loss, differentiable. A metric of the task (``"accuracy"``; ``"f1"`` and ``"em"`` of
    generated text) is minimised as one minus its mean, from forward passes of at most ``batch_size`` rows. A
    callable returns the value itself, as a mean over the examples it is given.
    """
    if callable(name):
        return _custom(name)
    if name == "loss":
        return TrainingLoss(task, pad_id(tokenizer))
    if name not in (known := objectives(task)):
        raise ConfigError(f'objective "{name}" does not fit {task.name} ({task.kind}), expected {" or ".join(known)}')
    return _black_box(name, task, tokenizer, batch_size)


def objectives(task: Task) -> tuple[str, ...]:
    """Return the names of the objectives that a task has."""
    accuracy = ("accuracy",) if task.kind in ("classification", "choice") else ()
    return ("loss", *accuracy, *task.scores)


def _black_box(name: str, task: Task, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Objective:
    def measure(model: Any, encoded: Sequence[Encoded]) -> Weighted:
        with evaluating(model):
            scores = [] if task.kind == "generation" else choice_scores(model, encoded, pad_id(tokenizer), batch_size)
            predictions = predict(model, tokenizer, task, encoded, scores, batch_size)
        if not all(one.are_numbers for one in scores):
            return Weighted(torch.tensor(torch.nan, dtype=torch.float64), len(encoded))
        missed = sum(1 - value for value in metric_values(task, name, encoded, predictions))
        return Weighted(torch.tensor(missed, dtype=torch.float64), len(encoded))

    return measure


def _custom(function: Callable[[Any, Sequence[Encoded]], float]) -> Objective:
    def measure(model: Any, encoded: Sequence[Encoded]) -> Weighted:
        value = float(function(model, encoded))
        return Weighted(torch.tensor(value * len(encoded), dtype=torch.float64), len(encoded))

    return measure
