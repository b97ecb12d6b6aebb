"""What a meta-training tells while it goes on, beside `zoft.deploy.events.Progress` and ``Warned``."""

from collections.abc import Callable
from dataclasses import dataclass

from zoft.deploy.events import Progress, Warned


@dataclass(frozen=True)
class MetaStarted:
    """Model and data are loaded; ``step`` is where the meta-training starts or goes on."""

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

    ``lowest`` and ``highest`` are the extreme scales ``s``, ``forwards`` all that were taken so far.
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
    """A run of the evidence is done: what drove it, how, and its loss on held-out rows before and after."""

    done: int
    total: int
    name: str
    task: str
    lr: float
    forwards: int
    loss_start: float
    loss: float


MetaEvent = MetaStarted | MetaStepDone | TrialDone | Progress | Warned
MetaListener = Callable[[MetaEvent], None]


def silent(event: MetaEvent) -> None:
    """Listen to nothing."""
