"""Small helpers for tests of tasks: examples encoded without any file."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from zoft.tasks.encode import Encoder
from zoft.tasks.types import Encoded, Example, Task


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much by waiting for one on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _no_row(row):
    raise AssertionError("this task is given examples, not rows")


def make_task(kind: str, **fields) -> Task:
    metric = {"classification": "accuracy", "choice": "accuracy", "generation": "f1", "text": "perplexity"}[kind]
    return Task(
        **{"name": kind, "kind": kind, "metric": metric, "source": "", "prompt": "", "example": _no_row} | fields
    )


@pytest.fixture
def encode(tokenizer) -> Callable[..., list[Encoded]]:
    """``encode(kind_or_task, examples, tokenizer=, context_length=)``: the examples as tokens."""

    def run(
        task: str | Task,
        examples: list[Example],
        tokenizer: PreTrainedTokenizerBase = tokenizer,
        context_length: int = 256,
    ) -> list[Encoded]:
        task = task if isinstance(task, Task) else make_task(task)
        encoder = Encoder(tokenizer, task, context_length)
        return [encoder.encode(example) for example in examples]

    return run
