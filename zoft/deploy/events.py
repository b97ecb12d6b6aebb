"""What a run tells while it goes on; the library yields events, the command line draws them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Started:
    """Model and data are loaded; ``step`` is where the run starts or goes on."""

    step: int
    steps: int
    model: str
    task: str
    method: str
    blocks: int
    parameters: int
    train: int
    dev: int
    test: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer step was journalled and applied.

    ``loss`` is the mean of the probes' losses, ``forwards`` counts the forward passes so far.
    """

    step: int
    steps: int
    loss: float
    lr: float
    forwards: float
    skipped: bool


@dataclass(frozen=True)
class Evaluated:
    """The model was scored on a split; ``kept`` says whether these weights are the best on dev so far."""

    step: int
    split: str
    loss: float
    metric: float | None
    metric_name: str | None
    kept: bool


@dataclass(frozen=True)
class Progress:
    """A long phase that is no step: loading, evaluating, replaying, saving."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Warned:
    """Something the user should know, and that stops nothing."""

    message: str


@dataclass(frozen=True)
class Noted:
    """A choice that was made for the user."""

    message: str


Event = Started | StepDone | Evaluated | Progress | Warned | Noted
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Listen to nothing."""
