"""The engine of every zeroth-order method: measure a step into a record, apply a record to the weights."""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from zoft.errors import ConfigError
from zoft.memory import Buffers
from zoft.noise.direction import Direction
from zoft.noise.rounding import Dither
from zoft.noise.table import chunk_length
from zoft.optim.core.fused_update import Together, dither_key
from zoft.optim.core.groups import Parameters, blocks_of, check_blocks, commonest_dtype, named_groups
from zoft.optim.core.oracle import Closure, Look, Whole
from zoft.optim.core.parts import Directions, Piece, ProbePiece, Projection, Rule, Term
from zoft.optim.core.record import ProjectionRecord, Record, StepRecord
from zoft.weights.blocks import Block
from zoft.weights.coverage import verify_coverage
from zoft.weights.dtypes import HALF, work_dtype


class ZOOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that needs forward passes only.

    ``step(closure)`` is ``record = measure(closure)``, hand the record to ``journal``, ``apply(record)``. ``measure``
    needs data and only reads the weights; ``apply`` needs the weights and no data, so a list of records replays a run
    bit for bit. A method is a combination of `zoft.optim.core.parts`: directions, a rule, perhaps a projection,
    which is measured and applied after a step with a record of its own.

    Args:
        params: a model (its trainable blocks), named parameters, or parameter groups of these.
        lr: learning rate, may be set per group and changed by a scheduler.
        eps: probe radius, in units of the weights.
        probes: directions measured and averaged in a step, q.
        weight_decay: decoupled; on blocks of two or more dimensions only, so not on norms and biases.
        seed: run seed; the noise is a function of (seed, step, probe, block name) and touches no global generator.
        master_weights: keep half-precision weights in float32 too and update that copy (twice their memory more).
        journal: called with every record before it is applied.
        directions, rule, projection: the parts of the method; MeZO's where not given.
        whole: the objective on all training examples, for the methods that ask for it.
    """

    needs_gradient = False  # whether a record alone moves nothing (`zoft.optim.methods.first_order`)

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float,
        eps: float,
        probes: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
        master_weights: bool = False,
        journal: Callable[[Record], None] | None = None,
        directions: Directions | None = None,
        rule: Rule | None = None,
        projection: Projection | None = None,
        whole: Whole | None = None,
    ) -> None:
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("eps", eps, eps > 0),
            ("probes", probes, probes >= 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("seed", seed, 0 <= seed < 2**63),
        ):
            if not good:
                raise ConfigError(f"{name} is {value}: expected a positive number")
        defaults = {"lr": lr, "eps": eps, "probes": probes, "weight_decay": weight_decay, "seed": seed, "step": 0}
        super().__init__(named_groups(params), defaults)
        self.journal = journal
        self._master_weights = master_weights
        self._buffers = Buffers()
        self._verified = False
        self.blocks = [block for group in self.param_groups for block in blocks_of(group)]
        check_blocks(self.blocks)
        self.table_dtype = commonest_dtype(self.blocks)
        self.directions, self.rule, self.projection = directions or Directions(), rule or Rule(), projection
        self.whole = whole
        for part in self._parts:
            part.check(self.blocks)
        self.forget()

    @property
    def memory(self) -> dict[str, Any]:
        """Numbers that follow from the records so far; `state_dict` carries them."""
        memory: dict[str, Any] = self.param_groups[0]["memory"]
        return memory

    @property
    def _parts(self) -> list[Directions | Rule | Projection]:
        return [part for part in (self.directions, self.rule, self.projection) if part is not None]

    def forget(self) -> None:
        """Drop all state, as at step 0: a snapshot or records are about to bring that of another step."""
        self.state.clear()
        self.scratch: dict[str, Any] = {}
        self.param_groups[0]["memory"] = {"updates": 0}
        for group in self.param_groups:
            group["step"] = 0

    # -- the seam -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, closure: Closure) -> StepRecord:
        """Evaluate ``closure`` at both ends of every probe and return the record; the weights are only read.

        ``closure`` takes nothing and returns a number to minimise (a float or a one-element tensor): a loss, or any
        black-box score. It must evaluate the same data at every call. The first call also checks that every weight
        that it reads can be perturbed (`verify`).
        """
        if not self._verified and (warning := self.verify(closure)):
            warnings.warn(warning, stacklevel=2)
        group = self.param_groups[0]
        look = Look(self, closure)
        record = StepRecord(
            step=group["step"],
            seed=group["seed"],
            lr=tuple(float(g["lr"]) for g in self.param_groups),
            eps=group["eps"],
            losses=(),
            scales=self._scales(),
        )
        return replace(self.rule.measure(self, look, record), forwards=look.forwards)

    @torch.no_grad()
    def apply(self, record: Record) -> None:
        """Update the weights by ``record``: a function of the weights, the state and the record alone.

        The arithmetic is fixed: in float32 (float64 for float64 weights), every product and sum rounded by itself, none
        fused, probes in order; then one rounding to the dtype of the weights, stochastic for half precision.
        """
        try:
            if isinstance(record, ProjectionRecord):
                self._apply_projection(record)
            else:
                self._apply_step(record)
        finally:
            self._buffers = Buffers()  # they are not there while the next step is measured

    def _apply_step(self, record: StepRecord) -> None:
        step = self.param_groups[0]["step"]
        if record.step != step:
            raise ConfigError(f"the record is of step {record.step}, the optimizer is at step {step}")
        if self.projection is not None:
            self.projection.start(self)
            if self.projection.due(step):
                self.projection.before(self, step)
        if not record.skipped:
            self.rule.before(self, record)
            directions = [self.directions.direction(self, record, probe) for probe in range(len(record.losses))]
            blocks, together = iter(self.blocks), Together(self, record)
            for group, lr in zip(self.param_groups, record.lr, strict=True):
                for block in itertools.islice(blocks, len(group["params"])):
                    rate = lr if self.projection is None else lr * self.projection.rate_of(self, block)
                    decay = rate * group["weight_decay"] if len(block.shape) > 1 else 0.0
                    terms = self.rule.terms(self, block, record, directions)
                    if not together.take(block, terms, rate, decay):
                        self.update_block(block, record, terms, rate, decay)
            together.update()
            self.directions.learn(self, record)
        self.observe(record)
        for group in self.param_groups:
            group["step"] = step + 1

    @torch.no_grad()
    def project(self, closure: Closure) -> ProjectionRecord | None:
        """Measure the projection that follows the step applied last; None where none is due.

        ``closure`` is that of the step, or another of the same kind; the weights are only read.
        """
        step = self.param_groups[0]["step"] - 1
        if self.projection is None or step < 0 or not self.projection.due(step):
            return None
        look = Look(self, closure)
        return replace(self.projection.measure(self, look, step), forwards=look.forwards)

    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step, and the projection that may follow it; return the mean of the measured losses."""
        record = self.measure(closure)
        self._take(record)
        if (projected := self.project(closure)) is not None:
            self._take(projected)
        return record.loss

    def _take(self, record: Record) -> None:
        if self.journal is not None:
            self.journal(record)
        self.apply(record)

    def _apply_projection(self, record: ProjectionRecord) -> None:
        step = self.param_groups[0]["step"]
        if self.projection is None or record.step != step - 1:
            raise ConfigError(f"the projection is of step {record.step}, the optimizer is at step {step}")
        if record.ratios:
            self.projection.apply(self, record)
        self.observe(record)

    def verify(self, closure: Closure) -> str | None:
        """Check that perturbing on use gives what perturbing in place gives (`verify_coverage`)."""
        self._verified = True
        return verify_coverage(self.blocks, closure)

    def observe(self, record: Record) -> None:
        """Take over what later steps read of ``record``; called for every record before those that are applied."""
        if isinstance(record, ProjectionRecord):
            if self.projection is not None and record.ratios:
                self.projection.remember(self, record)
        elif not record.skipped:
            for part in self._parts:
                part.observe(self, record)
            self.memory["updates"] += 1

    # -- directions ---------------------------------------------------------------------------------------------------

    def _scales(self) -> tuple[float, ...] | None:
        """The scale of every block at the present weights; None where all are 1."""
        return None

    def isotropic(self, record: StepRecord, probe: int, scales: Mapping[str, float] | None = None) -> Direction:
        """Return ``u = s z`` of a probe of ``record``'s step; ``scales`` stand in for those of the record."""
        if scales is None and record.scales is not None:
            scales = self.named_scales(record)
        return Direction(record.seed, record.step, probe, scales, self.table_dtype, self.blocks)

    def named_scales(self, record: StepRecord) -> dict[str, float]:
        """Return the scales of ``record`` by block name; an empty mapping where all are 1."""
        return {} if record.scales is None else dict(zip((b.name for b in self.blocks), record.scales, strict=True))

    # -- sweeping over a block ----------------------------------------------------------------------------------------

    def update_block(
        self, block: Block, record: StepRecord, terms: Sequence[Term], lr: float, decay: float = 0.0
    ) -> None:
        """Move ``block`` along ``terms`` by the rule: a sweep over its pieces, each rounded once."""
        terms = [(coefficient, direction) for coefficient, direction in terms if not direction.idle(block)]
        if not self.moves(terms, decay):
            return

        def update(theta: torch.Tensor, lo: int, hi: int) -> None:
            work = self._buffers.take("probe", hi - lo, theta.dtype, theta.device)
            probes = []
            for coefficient, direction in terms:
                ((_, _, z, factor),) = direction.windows(block, lo, hi)
                probes.append(ProbePiece(coefficient, z, factor, work))
            if decay:
                theta.mul_(1 - decay)
            self.rule.update(Piece(theta, probes, lr, block, lo, hi, self))

        self.sweep(block, dither_key(block, record), record.seed, update)

    def moves(self, terms: Sequence[Term], decay: float) -> bool:
        """Whether a block moves along ``terms``, none of them idle there, or by ``decay``."""
        return any(coefficient for coefficient, _ in terms) or bool(decay) or self.rule.momentum

    def sweep(self, block: Block, key: str, seed: int, update: Callable[[torch.Tensor, int, int], None]) -> None:
        """Call ``update(theta, lo, hi)`` on every piece of ``block``, in float32 or float64, and store what it leaves.

        ``key`` names the numbers that round half-precision weights stochastically. ``theta`` is the stored piece itself
        where it has that dtype, else a buffer that the next piece reuses.
        """
        weights = block.parameter.detach().view(-1)
        master = self.master(block)
        target = weights if master is None else master
        length, dtype = chunk_length(block), work_dtype(weights.dtype)
        dither = Dither(block, key, seed) if target.dtype in HALF else None
        for lo in range(0, block.size, length):
            hi = min(block.size, lo + length)
            theta = stored = target[lo:hi]
            if dither is not None:
                theta = self._buffers.take("weights", hi - lo, dtype, weights.device).copy_(stored)
            update(theta, lo, hi)
            if dither is not None:
                dither.round_(theta, lo, stored)
            if master is not None:
                weights[lo:hi] = theta

    def remembered(self, name: str, block: Block, fill: float = 0.0) -> torch.Tensor:
        """Return the state tensor ``name`` of ``block``, as large as it; made where there is none yet."""
        state = self.state[block.parameter]
        if name not in state:
            dtype = work_dtype(block.parameter.dtype)
            state[name] = torch.full(block.shape, fill, dtype=dtype, device=block.parameter.device)
        tensor: torch.Tensor = state[name]
        return tensor

    def master(self, block: Block) -> torch.Tensor | None:
        """Return the float32 copy of the half-precision ``block``, flat; None where it has none."""
        if not self._master_weights or block.parameter.dtype not in HALF:
            return None
        state = self.state[block.parameter]
        if "master" not in state:
            state["master"] = block.parameter.detach().float()
        return state["master"].view(-1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; state tensors keep their dtype, whatever the dtype of the weights."""
        super().load_state_dict(state_dict)
        self.scratch = {}
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, block in zip(indices, self.blocks, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[block.parameter][key] = value.to(block.parameter.device, copy=True)
