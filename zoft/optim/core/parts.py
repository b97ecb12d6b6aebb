"""What a method is made of: scales x directions x rule x projection, each a few settings and functions of a host.

*Scales* say how far each block is perturbed, *directions* along which ``u`` a probe is measured, a *rule* how slopes
become an update, a *projection* what follows an update. Parts hold settings only, validated on creation. Their state
lives in the optimizer, their `Host`, so that a part serves any number of them:

* tensors in ``host.state_of(block)``: saved with every snapshot, moved by `apply` alone;
* numbers in ``host.memory``: a function of the records so far, rebuilt by `observe`;
* ``host.scratch``: what can be computed again at any time, never saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from zoft.errors import ConfigError
from zoft.noise.direction import Direction, NoiseDirection
from zoft.optim.core.oracle import FullObjective, Oracle, read
from zoft.optim.core.pieces import Piece, Term
from zoft.optim.core.record import Measured, Number, ProjectionRecord, Step, StepRecord, StepStart
from zoft.weights.blocks import Block


class Host(Protocol):
    """The optimizer as its parts see it."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks, in order."""
        ...

    @property
    def probed(self) -> Sequence[Block]:
        """The blocks that directions perturb: all but those that move along an exact gradient."""
        ...

    @property
    def directions(self) -> Directions:
        """The part that gives directions, for rules that depend on it."""
        ...

    @property
    def probes(self) -> int:
        """Directions of a step, q."""
        ...

    @property
    def seed(self) -> int:
        """Run seed of the noise."""
        ...

    @property
    def step_number(self) -> int:
        """Number of the coming step."""
        ...

    @property
    def updates(self) -> int:
        """Updates so far; skipped steps are none."""
        ...

    @property
    def memory(self) -> dict[str, Any]:
        """Numbers that follow from the records so far."""
        ...

    @property
    def scratch(self) -> dict[str, Any]:
        """What can be computed again at any time."""
        ...

    @property
    def table_dtype(self) -> torch.dtype:
        """Dtype of the noise table: that of most weights."""
        ...

    @property
    def full(self) -> FullObjective | None:
        """The objective on all training examples, where it was given."""
        ...

    def state_of(self, block: Block) -> dict[str, Any]:
        """Return the state tensors of ``block`` by name."""
        ...

    def remembered(self, name: str, block: Block, fill: float = 0.0) -> torch.Tensor:
        """Return the state tensor ``name`` of ``block``, of its shape; made of ``fill`` where there is none yet."""
        ...

    def isotropic(self, step: Step, probe: int, scales: Mapping[str, float] | None = None) -> NoiseDirection:
        """Return ``u = s z`` of a probe of ``step``; ``scales`` by block name replace those of the step."""
        ...

    def named_scales(self, step: Step) -> dict[str, float]:
        """Return the scales of ``step`` by block name; those that are not named are 1."""
        ...

    def named_rates(self, step: Step) -> dict[str, float]:
        """Return the learning rate of every block in ``step`` by block name."""
        ...

    def sweep(
        self,
        block: Block,
        key: str,
        seed: int,
        update: Callable[[torch.Tensor, int, int], None],
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Call ``update(theta, lo, hi)`` on pieces of ``block``, by default all, and store the result, rounded once."""
        ...


class Part(BaseModel):
    """Scales, directions, a rule or a projection: immutable settings, checked when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError("; ".join(_problem(details, type(self)) for details in error.errors())) from error

    def check(self, host: Host) -> None:
        """Raise a `ZoftError` if this part cannot work with the blocks or the other parts of ``host``."""

    def observe(self, host: Host, record: StepRecord) -> None:
        """Store in ``host.memory`` what later steps need of ``record``, which was not skipped."""


class Scales(Part):
    """The scale ``s`` of every block: all 1, as MeZO has them."""

    def measure(self, host: Host) -> tuple[tuple[float, ...] | None, Mapping[str, Number]]:
        """Return the scales at the present weights, None where all are 1, and further numbers for the record."""
        return None, {}

    def before(self, host: Host, step: int) -> None:
        """Read what later scales need of the weights, before ``step`` moves them; before a skipped step, too."""


class Directions(Part):
    """Isotropic directions, ``u = s z`` with ``z ~ N(0, I)``, measured at both ends: MeZO's (arXiv 2305.17333)."""

    # Whether a direction depends on more than (seed, step, probe, scales), so that one of an earlier step is lost.
    stateful: ClassVar[bool] = False

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return the losses: here ``L(theta + eps u)`` and ``L(theta - eps u)`` of every probe."""
        unread: list[Any] = []
        for probe in range(host.probes):
            unread += oracle.both(self.direction(host, start, probe), start.eps)
        losses = read(unread)
        return Measured(tuple(zip(losses[::2], losses[1::2], strict=True)))

    def forwards(self, probes: int) -> int:
        """Return the forward passes that `measure` takes."""
        return 2 * probes

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the direction of one probe: the same while it is measured and when its record is applied."""
        return host.isotropic(step, probe)

    def weight(self, block: Block) -> float:
        """Return w with ``E[w u u^T] = I`` on ``block``, by which the update along ``u`` is multiplied."""
        return 1.0

    def learn(self, host: Host, record: StepRecord) -> None:
        """Move the state of the directions, after the weights have moved; not after a skipped step."""


class Rule(Part):
    """``theta <- theta - lr / q * sum_p slope_p u_p``: MeZO's."""

    # Whether blocks are to be updated in steps that do not perturb them.
    momentum: ClassVar[bool] = False
    # Whether the length of a step does not depend on that of the slopes.
    scale_free: ClassVar[bool] = False

    def measure(self, host: Host, oracle: Oracle, start: StepStart) -> Measured:
        """Return what the directions measure; a rule may measure more."""
        return host.directions.measure(host, oracle, start)

    def forwards(self, probes: int, steps: int, measured: int, whole: float) -> float:
        """Return the forward passes of ``steps`` steps, of which the directions' take ``measured`` each.

        ``whole`` is the cost of a pass over all training examples.
        """
        return steps * measured

    def before(self, host: Host, record: StepRecord) -> None:
        """Store what is needed of the weights before ``record`` is applied; not before a skipped step."""

    def coefficients(self, host: Host, record: StepRecord) -> tuple[float, ...]:
        """Return what every probe's direction is multiplied by: its slope over q."""
        return tuple(slope / len(record.losses) for slope in record.slopes)

    def terms(self, host: Host, block: Block, record: StepRecord, directions: Sequence[Direction]) -> list[Term]:
        """Return the coefficients and directions that ``block`` moves along; may move state of the block."""
        weight = host.directions.weight(block)
        return [
            (coefficient * weight, direction)
            for coefficient, direction in zip(self.coefficients(host, record), directions, strict=True)
        ]

    def update(self, host: Host, piece: Piece) -> None:
        """Update a piece of a block in place."""
        for probe in piece.probes:
            piece.theta.sub_(probe.times(piece.lr * probe.slope * probe.factor))


class Projection(Part):
    """A change of the weights that follows an update, with a record of its own."""

    def due(self, step: int) -> bool:
        """Whether a projection follows ``step``."""
        raise NotImplementedError

    def forwards(self, steps: int) -> float:
        """Return the forward passes of the projections in ``steps`` steps."""
        raise NotImplementedError

    def start(self, host: Host) -> None:
        """Store what is needed of the base's weights; called before every step, acts before the first alone."""

    def before(self, host: Host, step: int) -> None:
        """Store what is needed of the weights before ``step`` is applied; called where a projection is due after it."""

    def measure(self, host: Host, oracle: Oracle, step: int) -> ProjectionRecord:
        """Measure the projection that follows ``step``."""
        raise NotImplementedError

    def apply(self, host: Host, record: ProjectionRecord) -> None:
        """Move the weights as ``record`` says."""
        raise NotImplementedError

    def remember(self, host: Host, record: ProjectionRecord) -> None:
        """Store in ``host.memory`` what later steps need of ``record``."""

    def rate_of(self, host: Host, block: Block) -> float:
        """Return the factor on the learning rate of ``block``."""
        return 1.0


KINDS: dict[str, type[Part]] = {
    "scales": Scales,
    "directions": Directions,
    "rule": Rule,
    "projection": Projection,
}


def _problem(details: Any, part: type[Part]) -> str:
    name = str(details["loc"][0]) if details["loc"] else ""
    if details["type"] == "extra_forbidden":
        return f"{part.__name__} has no option {name!r}; {known_options(part.model_fields)}"
    message = details["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}, found {details['input']!r}" if name else message


def known_options(names: Iterable[str], wanted: str = "") -> str:
    """Return a list of the options for a message, the nearest to ``wanted`` first."""
    known = list(names)
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return hint + (f"there are {', '.join(known)}" if known else "there are none")
