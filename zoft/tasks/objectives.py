"""What a step minimises: the training loss, or one minus a metric, which needs no gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from zoft.errors import ConfigError
from zoft.tasks.batches import Laid, lay_out, length_step, pad_id
from zoft.tasks.evaluate import evaluating, metric_values, predict, score
from zoft.tasks.losses import loss
from zoft.tasks.packing import packable
from zoft.tasks.types import Encoded, Task, Weighted

Objective = Callable[[Any, Sequence[Encoded]], Weighted]


def objective(
    name: str | Callable[[Any, Sequence[Encoded]], float],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
) -> Objective:
    """Return ``(model, encoded) -> Weighted`` to be minimised.

    ``"loss"`` is the training loss, differentiable. A metric of the task (``"accuracy"``; ``"f1"`` and ``"em"`` of
    generated text) is minimised as one minus its mean, from forward passes of at most ``batch_size`` rows. A
    callable gives the number itself, as a mean over the examples it is called with.
    """
    if callable(name):
        return _custom(name)
    if name == "loss":
        return TrainingLoss(task, pad_id(tokenizer))
    if name not in (known := objectives(task)):
        raise ConfigError(f'objective "{name}" does not fit {task.name} ({task.kind}), expected {" or ".join(known)}')
    return _black_box(name, task, tokenizer, batch_size)


class TrainingLoss:
    """The training loss of a task: ``(model, encoded) -> Weighted``, differentiable.

    What was laid out last is kept: both ends of a probe read the same batch.
    """

    def __init__(self, task: Task, filler: int) -> None:
        self.task, self.filler = task, filler
        self._last: tuple[tuple[Any, ...], Sequence[Encoded], Laid] | None = None

    def __call__(self, model: Any, encoded: Sequence[Encoded]) -> Weighted:
        """Return the loss of ``encoded``; the host does not wait for it."""
        return loss(model, self.task, self.laid_out(model, encoded).to(model.device))

    def laid_out(self, model: Any, encoded: Sequence[Encoded]) -> Laid:
        """Return ``encoded`` as the rows that ``model`` can take, in host memory."""
        settings = (length_step(model.dtype), packable(model))
        key = (*settings, *map(id, encoded))
        if self._last is None or self._last[0] != key:
            # The examples are kept, so that no others can have their identities.
            self._last = key, list(encoded), lay_out(encoded, self.filler, *settings)
        return self._last[2]


def objectives(task: Task) -> tuple[str, ...]:
    """The names of the objectives that a task has."""
    accuracy = ("accuracy",) if task.kind in ("classification", "choice") else ()
    return ("loss", *accuracy, *task.scores)


def _black_box(name: str, task: Task, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Objective:
    def measure(model: Any, encoded: Sequence[Encoded]) -> Weighted:
        with evaluating(model):
            scores = [] if task.kind == "generation" else score(model, encoded, pad_id(tokenizer), batch_size)
            predictions = predict(model, tokenizer, task, encoded, scores, batch_size)
        missed = sum(1 - value for value in metric_values(task, name, encoded, predictions))
        return Weighted(torch.tensor(missed, dtype=torch.float64), len(encoded))

    return measure


def _custom(function: Callable[[Any, Sequence[Encoded]], float]) -> Objective:
    def measure(model: Any, encoded: Sequence[Encoded]) -> Weighted:
        value = float(function(model, encoded))
        return Weighted(torch.tensor(value * len(encoded), dtype=torch.float64), len(encoded))

    return measure
