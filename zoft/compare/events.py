"""What a comparison tells while it goes on; the events of the run at hand come in between."""

from dataclasses import dataclass

from zoft.compare.cells import Cell, Outcome
from zoft.deploy import Event


@dataclass(frozen=True)
class CellStarted:
    """A run begins or goes on; ``done`` of ``total`` runs are over. The total grows where a best rate is at an edge."""

    cell: Cell
    done: int
    total: int


@dataclass(frozen=True)
class CellDone:
    """A run is over."""

    outcome: Outcome
    done: int
    total: int


@dataclass(frozen=True)
class CellFailed:
    """A run could not be made; the others go on, and it is tried again the next time."""

    cell: Cell
    why: str


CompareEvent = CellStarted | CellDone | CellFailed | Event
