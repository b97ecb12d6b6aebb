"""What a model is trained on: tasks, prompts, data, batches, losses and metrics."""

from zoft.tasks.batches import Batch, batch_indices, collate, pad_id, tokens_read, tokens_scored
from zoft.tasks.builtin import TASKS, get_task
from zoft.tasks.cloze import CLOZES
from zoft.tasks.evaluate import evaluate
from zoft.tasks.losses import loss
from zoft.tasks.objectives import objective, objectives
from zoft.tasks.prepare import prepare
from zoft.tasks.types import Encoded, Evaluation, Example, Prepared, Task, Weighted

__all__ = [
    "CLOZES",
    "TASKS",
    "Batch",
    "Encoded",
    "Evaluation",
    "Example",
    "Prepared",
    "Task",
    "Weighted",
    "batch_indices",
    "collate",
    "evaluate",
    "get_task",
    "loss",
    "objective",
    "objectives",
    "pad_id",
    "prepare",
    "tokens_read",
    "tokens_scored",
]
