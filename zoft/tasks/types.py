"""Records of a task: an example as text and as tokens, the prepared splits, and their scores."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["classification", "choice", "generation", "text"]
Split = Literal["train", "dev", "test"]
Score = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Example:
    """One row as text.

    ``choices`` are the continuations exactly as they are appended to ``prompt``; a generation or text example has
    one, its target. ``label`` is the index of the choice that is trained on. ``also_right`` lists further choices
    that count as correct (ReCoRD), ``answers`` the acceptable answers of a generation task, and ``spans`` the
    character ranges of ``prompt + choices[0]`` that are trained where that is not the whole choice (the assistant's
    turns of a conversation). ``suffix`` is the text after the choice, which only masked models read.

    >>> Example("a fine film It was", (" terrible", " great"), label=1).full_text(1)
    'a fine film It was great'
    """

    prompt: str
    choices: tuple[str, ...]
    label: int = 0
    answers: tuple[str, ...] = ()
    also_right: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    suffix: str = ""

    def full_text(self, choice: int) -> str:
        """The prompt with one choice appended, and what comes after it."""
        return self.prompt + self.choices[choice] + self.suffix


@dataclass(frozen=True)
class HubSource:
    """Where a task's rows are on the Hugging Face Hub; ``splits`` maps ``train`` and ``test`` to the Hub's names.

    Without a ``test`` split the test rows are taken from ``train``, after those of train and dev. ``label`` names a
    column in which -1 means that a row has no gold label; such rows are left out.
    """

    id: str
    config: str | None
    revision: str
    splits: Mapping[str, str]
    label: str | None = None


@dataclass(frozen=True)
class Task:
    """A task: how a row becomes an example, and how the model's outputs are scored.

    ``metric`` is the main one; ``scores`` holds the metrics of generated text. ``words`` are the label words where
    they are the same for every row, ``target`` names the field that the choices come from (for messages).
    """

    name: str
    kind: Kind
    metric: Literal["accuracy", "f1", "em", "perplexity"]
    source: str
    prompt: str
    example: Callable[[Mapping[str, Any]], Example]
    words: tuple[str, ...] = ()
    target: str = "label"
    hub: HubSource | None = None
    dev_size: int = 500
    scores: Mapping[str, Score] = field(default_factory=dict)
    stop: str | None = None
    max_new_tokens: int = 50
    append_eos: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """The tokens one choice is scored on; the logits at ``positions[i]`` of the row predict ``tokens[i]``."""

    choice: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence that the model reads, and the choices it scores; the last token is predicted, not read."""

    ids: tuple[int, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as tokens: ``rows`` score every choice, ``loss_rows`` are those the training loss reads.

    ``prompt_ids`` is the prompt of a generation task (empty for other kinds).
    """

    example: Example
    rows: tuple[Row, ...]
    loss_rows: tuple[Row, ...]
    prompt_ids: tuple[int, ...] = ()

    @property
    def label(self) -> int:
        """Index of the choice that is trained on."""
        return self.example.label

    @property
    def tokens(self) -> int:
        """Tokens read by one evaluation of the training loss."""
        return sum(len(row.ids) for row in self.loss_rows)


@dataclass(frozen=True)
class Prepared:
    """A task, its encoded splits (empty where absent and not required), and warnings for the user.

    ``date`` is the one that the chat template wrote into conversations; None if it wrote none.
    """

    task: Task
    train: tuple[Encoded, ...]
    dev: tuple[Encoded, ...]
    test: tuple[Encoded, ...]
    warnings: tuple[str, ...] = ()
    date: datetime.date | None = None


@dataclass(frozen=True)
class Weighted:
    """A sum in float64 and its weight, the number of terms, so that micro-batches average exactly.

    >>> (Weighted(torch.tensor(3.0), 2) + Weighted(torch.tensor(1.0), 6)).value.item()
    0.5
    """

    total: torch.Tensor
    weight: int

    @property
    def value(self) -> torch.Tensor:
        """The mean."""
        return self.total / self.weight

    def __add__(self, other: "Weighted") -> "Weighted":
        return Weighted(self.total + other.total, self.weight + other.weight)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split.

    ``loss`` is the training objective: nats per example for classification, nats per target token otherwise.
    ``predictions`` are choice indices, or generated texts, in the order of the examples; empty for plain text.
    """

    loss: float
    metric: float | None
    metric_name: str
    examples: int
    tokens: int
    predictions: tuple[int, ...] | tuple[str, ...] = ()
