"""What a method is made of: directions x rule x projection, each a few settings and functions of an optimizer.

A *direction* says along which ``u`` a probe is measured, a *rule* how slopes become an update, a *projection* what is
done to the weights after it. Parts hold settings only, validated on creation. What they remember lives in the
optimizer, so that a part serves any number of them:

* tensors in ``optimizer.state[parameter]``: saved with every snapshot, moved by `apply` alone;
* numbers in ``optimizer.memory``: a function of the records so far, rebuilt by `observe`;
* ``optimizer.scratch``: what can be computed again at any time, never saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from zoft.errors import ConfigError
from zoft.noise.direction import Direction
from zoft.optim.core.oracle import read
from zoft.optim.core.record import ProjectionRecord, StepRecord
from zoft.weights.blocks import Block

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer
    from zoft.optim.core.oracle import Look

Term = tuple[float, Direction]  # an update is -lr * sum of coefficient * u


@dataclass(frozen=True)
class ProbePiece:
    """A term on a piece of a block: there ``u = factor * z``, and the update is ``-lr * slope * u``.

    ``z`` may be a view of the noise table, of its dtype and any strides; ``work`` is a flat buffer for `times`.
    """

    slope: float
    z: torch.Tensor
    factor: float
    work: torch.Tensor

    def times(self, number: float) -> torch.Tensor:
        """Return ``z * number``, flat, in the dtype of the weights; valid until the next call for any probe."""
        product = self.work.view(self.z.shape)
        if self.z.dtype == product.dtype:
            torch.mul(self.z, number, out=product)
        else:
            product.copy_(self.z).mul_(number)
        return self.work


@dataclass(frozen=True)
class Piece:
    """A piece of a block that a rule updates in place: flat range ``lo:hi``, weights in float32 or float64."""

    theta: torch.Tensor
    probes: Sequence[ProbePiece]
    lr: float
    block: Block
    lo: int
    hi: int
    optimizer: ZOOptimizer

    @property
    def updates(self) -> int:
        """Updates that were taken before this one; steps that were skipped are none."""
        return int(self.optimizer.memory["updates"])

    def state(self, name: str) -> torch.Tensor:
        """Return this piece of the state tensor ``name`` of the block, made of zeros where there is none yet."""
        return self.optimizer.remembered(name, self.block).view(-1)[self.lo : self.hi]

    def gradient(self) -> torch.Tensor:
        """Return the estimated gradient on this piece: the sum of ``slope * u``."""
        total = torch.zeros_like(self.theta)
        for probe in self.probes:
            total.add_(probe.times(probe.slope * probe.factor))
        return total


class Part(BaseModel):
    """A direction, a rule or a projection: immutable settings, checked when it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError("; ".join(_problem(details, type(self)) for details in error.errors())) from error

    def check(self, blocks: Sequence[Block]) -> None:
        """Raise `ModelError` if this part can do nothing with ``blocks``."""

    def observe(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        """Take over into ``optimizer.memory`` what later steps need of ``record``, which was not skipped."""


class Directions(Part):
    """Isotropic directions, ``u = s z`` with ``z ~ N(0, I)``, measured at both ends: MeZO's (arXiv 2305.17333)."""

    # Whether a direction depends on more than (seed, step, probe, scales), so that one of an earlier step is lost.
    stateful: ClassVar[bool] = False

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """Return ``record`` with its losses: here ``L(theta + eps u)`` and ``L(theta - eps u)`` of every probe."""
        unread: list[Any] = []
        for probe in range(optimizer.param_groups[0]["probes"]):
            direction = self.direction(optimizer, record, probe)
            unread += look.both(direction, record.eps)
        losses = read(unread)
        return replace(record, losses=tuple(zip(losses[::2], losses[1::2], strict=True)))

    def forwards(self, probes: int) -> int:
        """Return the forward passes that `measure` takes."""
        return 2 * probes

    def direction(self, optimizer: ZOOptimizer, record: StepRecord, probe: int) -> Direction:
        """Return the direction of one probe: the same while it is measured and when ``record`` is applied."""
        return optimizer.isotropic(record, probe)

    def weight(self, block: Block) -> float:
        """Return w with ``E[w u u^T] = I`` on ``block``, by which the update along ``u`` is multiplied."""
        return 1.0

    def learn(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        """Move the state of the directions, after the weights have moved; not after a skipped step."""


class Rule(Part):
    """``theta <- theta - lr / q * sum_p slope_p u_p``: MeZO's."""

    # Whether blocks are to be updated in steps that do not perturb them.
    momentum: ClassVar[bool] = False

    def measure(self, optimizer: ZOOptimizer, look: Look, record: StepRecord) -> StepRecord:
        """Return ``record`` as the directions complete it; a rule may measure more."""
        return optimizer.directions.measure(optimizer, look, record)

    def forwards(self, probes: int, steps: int, measured: int, whole: float) -> float:
        """Return the forward passes of ``steps`` steps, of which the directions' take ``measured`` each.

        ``whole`` is what a pass over all training examples costs.
        """
        return steps * measured

    def before(self, optimizer: ZOOptimizer, record: StepRecord) -> None:
        """Take note of the weights before ``record`` is applied; not before a skipped step."""

    def coefficients(self, optimizer: ZOOptimizer, record: StepRecord) -> tuple[float, ...]:
        """Return what every probe's direction is multiplied by: its slope over q."""
        return tuple(slope / len(record.losses) for slope in record.slopes)

    def terms(
        self, optimizer: ZOOptimizer, block: Block, record: StepRecord, directions: Sequence[Direction]
    ) -> list[Term]:
        """Return the coefficients and directions that ``block`` moves along; may move state of the block."""
        weight = optimizer.directions.weight(block)
        return [
            (coefficient * weight, direction)
            for coefficient, direction in zip(self.coefficients(optimizer, record), directions, strict=True)
        ]

    def update(self, piece: Piece) -> None:
        """Update a piece of a block in place."""
        for probe in piece.probes:
            piece.theta.sub_(probe.times(piece.lr * probe.slope * probe.factor))


class Projection(Part):
    """What is done to the weights after an update, in steps of its own."""

    def due(self, step: int) -> bool:
        """Whether a projection follows ``step``."""
        raise NotImplementedError

    def forwards(self, steps: int) -> float:
        """Return the forward passes of the projections in ``steps`` steps."""
        raise NotImplementedError

    def start(self, optimizer: ZOOptimizer) -> None:
        """Take note of the weights of the base; called before every step, does something before the first alone."""

    def before(self, optimizer: ZOOptimizer, step: int) -> None:
        """Take note of the weights before ``step`` is applied; called where a projection is due after it."""

    def measure(self, optimizer: ZOOptimizer, look: Look, step: int) -> ProjectionRecord:
        """Measure the projection that follows ``step``."""
        raise NotImplementedError

    def apply(self, optimizer: ZOOptimizer, record: ProjectionRecord) -> None:
        """Move the weights as ``record`` says."""
        raise NotImplementedError

    def remember(self, optimizer: ZOOptimizer, record: ProjectionRecord) -> None:
        """Take over into ``optimizer.memory`` what later steps need of ``record``."""

    def rate_of(self, optimizer: ZOOptimizer, block: Block) -> float:
        """Return what multiplies the learning rate of ``block``."""
        return 1.0


def _problem(details: Any, part: type[Part]) -> str:
    name = str(details["loc"][0]) if details["loc"] else ""
    if details["type"] == "extra_forbidden":
        return f"{part.__name__} has no option {name!r}; {known_options(part.model_fields)}"
    message = details["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}, found {details['input']!r}" if name else message


def known_options(names: Iterable[str], wanted: str = "") -> str:
    """Return words that say what options there are, the nearest to ``wanted`` first."""
    known = list(names)
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return hint + (f"there are {', '.join(known)}" if known else "there are none")
