"""In-context learning: solved training rows before the question, without training (arXiv 2005.14165)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from zoft.errors import DataError
from zoft.tasks.rows import Located
from zoft.tasks.types import Example, Task

SEPARATOR = "\n\n"


def with_demonstrations(task: Task, train: Sequence[Located], count: int, seed: int) -> Task:
    """Return ``task`` with ``count`` training rows, drawn by ``seed``, solved before each of its prompts.

    A prompt longer than the model's context is truncated from the left, so the last demonstrations stay. MeZO's
    comparison takes 32 (arXiv 2305.17333).

    Raises:
        DataError: there are too few training rows, or they are plain text without a question.
    """
    if task.kind == "text":
        raise DataError(f"{task.name} is plain text: there is no question to put demonstrations before")
    if len(train) < count:
        raise DataError(f"{count} demonstrations from {len(train)} training rows; ask for fewer, or give more rows")
    order = np.random.RandomState(seed % 2**32).permutation(len(train))[:count]
    solved = [_solved(task, train[int(place)]) for place in order]
    before = SEPARATOR.join(solved) + SEPARATOR

    def example(row: Mapping[str, Any]) -> Example:
        asked = task.example(row)
        return replace(asked, prompt=before + asked.prompt)

    return replace(task, example=example)


def _solved(task: Task, located: Located) -> str:
    try:
        shown = task.example(located.row)
    except DataError as error:
        raise DataError(f"{located.place}: {error}") from error
    return shown.full_text(shown.label).strip()
