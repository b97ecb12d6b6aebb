"""Events of long jobs: the library emits them, the command line draws them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a long phase other than training: loading, evaluating, replaying, saving."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Warned:
    """A warning: the user should know, and the job goes on."""

    message: str


@dataclass(frozen=True)
class Noted:
    """A choice that was made for the user."""

    message: str


@dataclass(frozen=True)
class Started:
    """Model and data are loaded; ``step`` is where the run starts or resumes."""

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
    """The model was scored on a split; ``kept``: these weights are the best on dev so far."""

    step: int
    split: str
    loss: float
    metric: float | None
    metric_name: str | None
    kept: bool


@dataclass(frozen=True)
class MetaStarted:
    """Model and data are loaded; ``step`` is where the meta-training starts or resumes."""

    step: int
    steps: int
    model: str
    tasks: tuple[str, ...]
    blocks: int
    parameters: int
    networks: int


@dataclass(frozen=True)
class MetaStepDone:
    """One point is done. ``gain`` is the fall of the loss in one zeroth-order step, ``lr`` the rate of that step.

    ``lowest`` and ``highest`` are the extreme scales ``s``, ``forwards`` all forward passes so far.
    """

    step: int
    steps: int
    task: str
    loss: float
    gain: float
    lr: float
    lowest: float
    highest: float
    forwards: int
    skipped: bool


@dataclass(frozen=True)
class TrialDone:
    """A run of the evidence is done: contender, settings, and the loss on held-out rows before and after."""

    done: int
    total: int
    name: str
    task: str
    lr: float
    forwards: int
    loss_start: float
    loss: float


Event = Started | StepDone | Evaluated | Progress | Warned | Noted
Listener = Callable[[Event], None]
MetaEvent = MetaStarted | MetaStepDone | TrialDone | Progress | Warned
MetaListener = Callable[[MetaEvent], None]
StagesListener = Callable[[Event | MetaEvent], None]  # of both stages


def silent(event: object) -> None:
    """Ignore the event: the default listener."""
