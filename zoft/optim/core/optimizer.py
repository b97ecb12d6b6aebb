"""`ZOOptimizer`: the engine of every zeroth-order method."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from zoft.errors import ConfigError
from zoft.memory import Buffers
from zoft.noise.direction import NoiseDirection
from zoft.noise.rounding import Dither
from zoft.noise.table import chunk_length
from zoft.optim.core import fused_update
from zoft.optim.core.base import RecordOptimizer
from zoft.optim.core.exact import ExactHead
from zoft.optim.core.groups import Parameters, commonest_dtype
from zoft.optim.core.oracle import Closure, FullObjective, Oracle
from zoft.optim.core.parts import Directions, Part, Projection, Rule, Scales
from zoft.optim.core.pieces import Piece, ProbePiece, Term
from zoft.optim.core.record import Measured, ProjectionRecord, Record, Step, StepRecord, StepStart
from zoft.weights.blocks import Block
from zoft.weights.coverage import verify_coverage
from zoft.weights.dtypes import HALF, work_dtype

Body = Literal["zo", "frozen"]  # what becomes of the blocks that no exact gradient moves


class ZOOptimizer(RecordOptimizer):
    """A `torch.optim.Optimizer` that needs forward passes only.

    ``measure`` needs data and only reads the weights; ``apply`` needs the weights and no data, so a list of records
    replays a run bit for bit. A method is a combination of `zoft.optim.core.parts`: scales, directions, a rule, perhaps
    a projection, which is measured and applied after a step with a record of its own.

    Args:
        params: a model (its trainable blocks), named parameters, or parameter groups of these.
        lr: learning rate, may be set per group and changed by a scheduler.
        eps: probe radius, in units of the weights.
        probes: directions measured and averaged in a step, q.
        weight_decay: decoupled; on blocks of two or more dimensions only, so not on norms and biases.
        seed: run seed; the noise is a function of (seed, step, probe, block name) and touches no global generator.
        master_weights: keep half-precision weights in float32 too and update that copy (twice their memory more).
        journal: called with every record before it is applied.
        scales, directions, rule, projection: the parts of the method; MeZO's where not given.
        exact: moves the head along its exact gradient, which the objective's logits give; None: nothing.
        body: ``"frozen"``: what ``exact`` does not move stays, and a step takes one forward pass, at theta.
        full: the objective on all training examples, for the methods that ask for it.
    """

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
        scales: Scales | None = None,
        directions: Directions | None = None,
        rule: Rule | None = None,
        projection: Projection | None = None,
        exact: ExactHead | None = None,
        body: Body = "zo",
        full: FullObjective | None = None,
    ) -> None:
        if body == "frozen" and exact is None:
            raise ConfigError("body is frozen and nothing is exact, so nothing would move: give exact, or body zo")
        defaults = {"lr": lr, "eps": eps, "probes": probes, "weight_decay": weight_decay, "seed": seed}
        super().__init__(params, defaults, journal)
        self._master_weights = master_weights
        self._buffers = Buffers()
        self.table_dtype = commonest_dtype(self.blocks)
        self.scales, self.directions, self.rule = scales or Scales(), directions or Directions(), rule or Rule()
        self.projection, self.full = projection, full
        self.exact, self.body = exact, body
        self.forget()
        if exact is not None:
            self.param_groups[0]["exact_lr"] = exact.default_lr
        for part in self._parts:
            part.check(self)

    @property
    def probes(self) -> int:
        """Directions of a step, q."""
        probes: int = self.param_groups[0]["probes"]
        return probes

    @property
    def memory(self) -> dict[str, Any]:
        """Numbers that follow from the records so far; `state_dict` carries them."""
        memory: dict[str, Any] = self.param_groups[0]["memory"]
        return memory

    @property
    def updates(self) -> int:
        """Updates so far; skipped steps are none."""
        return int(self.memory["updates"])

    @property
    def _parts(self) -> list[Part]:
        parts = (self.scales, self.directions, self.rule, self.projection)
        return [part for part in (*parts, self.exact) if part is not None]

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        """Whether records lack the exact gradient, so that a step has to be measured again to be applied."""
        return self.exact is not None and not self.exact.recorded(self)

    @property
    def probed(self) -> list[Block]:
        """The blocks that directions perturb: those that no exact gradient moves."""
        return [block for block in self.blocks if block.name not in self._owned]

    @property
    def _owned(self) -> frozenset[str]:
        return frozenset() if self.exact is None else self.exact.owned(self)

    def forget(self) -> None:
        """Drop all state, as at step 0: a snapshot or records are about to bring that of another step."""
        super().forget()
        self.scratch: dict[str, Any] = {}
        self.param_groups[0]["memory"] = {"updates": 0}

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
        meter = None
        if self.exact is not None:
            self.exact.prepare(self, closure)
            meter = self.exact.meter(self)
        record = self._measured(Oracle(self.blocks, closure, self.full, meter))
        if self.exact is None or meter is None:
            return record
        return self.exact.measured(self, record, meter, float(self.param_groups[0]["exact_lr"]))

    def _measured(self, oracle: Oracle) -> StepRecord:
        """The record of the coming step, without exact gradients."""
        if self.body == "frozen":
            loss = oracle()
            start = StepStart(self.step_number, self.seed, self.learning_rates, self.eps)
            return start.record(Measured(((loss, loss),)), oracle.forwards)
        scales, extra = self.scales.measure(self)
        start = StepStart(self.step_number, self.seed, self.learning_rates, self.eps, scales)
        measured = self.rule.measure(self, oracle, start)
        return start.record(replace(measured, extra={**measured.extra, **extra}), oracle.forwards)

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
        self._check_step(record)
        if self.exact is not None:
            self.exact.before(self, record)
        if self.body == "zo":
            self._before_body(record)
        if not record.skipped:
            if self.body == "zo":
                self._update(record)
            if self.exact is not None:
                groups = self._blocks_with_rates(record)
                self.exact.apply(self, record, {block.name: self._decay_of(group, block) for group, block, _ in groups})
        self.observe(record)
        self.step_number = record.step + 1

    def _before_body(self, record: StepRecord) -> None:
        """Store what later steps and projections need of the weights."""
        self.scales.before(self, record.step)
        if self.projection is not None:
            self.projection.start(self)
            if self.projection.due(record.step):
                self.projection.before(self, record.step)

    @torch.no_grad()
    def project(self, closure: Closure) -> ProjectionRecord | None:
        """Measure the projection that follows the step applied last; None where none is due.

        ``closure`` is that of the step, or another of the same kind; the weights are only read.
        """
        step = self.step_number - 1
        if self.projection is None or self.body == "frozen" or step < 0 or not self.projection.due(step):
            return None
        oracle = Oracle(self.blocks, closure, self.full)
        return replace(self.projection.measure(self, oracle, step), forwards=oracle.forwards)

    def _apply_projection(self, record: ProjectionRecord) -> None:
        if self.projection is None or record.step != self.step_number - 1:
            raise ConfigError(f"the projection is of step {record.step}, the optimizer is at step {self.step_number}")
        if record.ratios:
            self.projection.apply(self, record)
        self.observe(record)

    def verify(self, closure: Closure) -> str | None:
        """Check that perturbing on use gives what perturbing in place gives (`verify_coverage`)."""
        self._verified = True
        if self.exact is not None:
            self.exact.prepare(self, closure)
        return verify_coverage(self.blocks, closure) if self.body == "zo" else None

    def observe(self, record: Record) -> None:
        """Store what later steps read of ``record``; called for every record before those that are applied."""
        if isinstance(record, ProjectionRecord):
            if self.projection is not None and record.ratios:
                self.projection.remember(self, record)
        elif not record.skipped:
            for part in self._parts:
                part.observe(self, record)
            self.memory["updates"] += 1

    # -- what parts use (`zoft.optim.core.parts.Host`) ----------------------------------------------------------------

    def isotropic(self, step: Step, probe: int, scales: Mapping[str, float] | None = None) -> NoiseDirection:
        """Return ``u = s z`` of a probe of ``step``; ``scales`` by block name replace those of the step."""
        if scales is None:
            scales = self.named_scales(step)
        elif self.exact is not None:
            scales = {**scales, **dict.fromkeys(self._owned, 0.0)}
        return NoiseDirection(step.seed, step.step, probe, scales, self.table_dtype, self.blocks)

    def named_scales(self, step: Step) -> dict[str, float]:
        """Return the scales of ``step`` by block name; those that are not named are 1, of exact blocks they are 0."""
        scales = {} if step.scales is None else dict(zip((b.name for b in self.blocks), step.scales, strict=True))
        return {**scales, **dict.fromkeys(self._owned, 0.0)}

    def named_rates(self, step: Step) -> dict[str, float]:
        """Return the learning rate of every block in ``step`` by block name."""
        return {block.name: lr for _, block, lr in self._blocks_with_rates(step)}

    def _blocks_with_rates(self, step: Step) -> Iterator[tuple[dict[str, Any], Block, float]]:
        """Every block with its parameter group and its learning rate in ``step``, in order."""
        blocks = iter(self.blocks)
        for group, lr in zip(self.param_groups, step.lr, strict=True):
            for block in itertools.islice(blocks, len(group["params"])):
                yield group, block, lr

    def remembered(self, name: str, block: Block, fill: float = 0.0) -> torch.Tensor:
        """Return the state tensor ``name`` of ``block``, of its shape; made of ``fill`` where there is none yet."""
        state = self.state_of(block)
        if name not in state:
            dtype = work_dtype(block.parameter.dtype)
            state[name] = torch.full(block.shape, fill, dtype=dtype, device=block.parameter.device)
        tensor: torch.Tensor = state[name]
        return tensor

    def sweep(
        self,
        block: Block,
        key: str,
        seed: int,
        update: Callable[[torch.Tensor, int, int], None],
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Call ``update(theta, lo, hi)`` on every piece of ``block``, in float32 or float64, and store the result.

        ``key`` names the numbers that round half-precision weights stochastically. ``theta`` is the stored piece itself
        where it has that dtype, else a buffer that the next piece reuses. ``spans`` are the pieces, each within one
        chunk of the block, where not all of it changes.
        """
        weights = block.parameter.detach().view(-1)
        master = self._master(block)
        target = weights if master is None else master
        length, dtype = chunk_length(block), work_dtype(weights.dtype)
        dither = Dither(block, key, seed) if target.dtype in HALF else None
        for lo, hi in spans or [(lo, min(block.size, lo + length)) for lo in range(0, block.size, length)]:
            theta = stored = target[lo:hi]
            if dither is not None:
                theta = self._buffers.take("weights", hi - lo, dtype, weights.device).copy_(stored)
            update(theta, lo, hi)
            if dither is not None:
                dither.round_(theta, lo, stored)
            if master is not None:
                weights[lo:hi] = theta

    # -- the update ---------------------------------------------------------------------------------------------------

    def _update(self, record: StepRecord) -> None:
        """Move every block along its terms: one by one, or many of a GPU in one launch."""
        self.rule.before(self, record)
        directions = [self.directions.direction(self, record, probe) for probe in range(len(record.losses))]
        fused = fused_update.FusedUpdate(record, self.table_dtype)
        plain = type(self.rule).update is Rule.update and not self.rule.momentum
        owned = self._owned
        for group, block, lr in self._blocks_with_rates(record):
            if block.name in owned:
                continue
            rate = lr if self.projection is None else lr * self.projection.rate_of(self, block)
            decay = rate * self._decay_of(group, block)
            terms = self.rule.terms(self, block, record, directions)
            fusible = plain and fused_update.serves(block, terms) and self._master(block) is None
            terms = [(coefficient, direction) for coefficient, direction in terms if not direction.idle(block)]
            if not (any(coefficient for coefficient, _ in terms) or decay or self.rule.momentum):
                continue
            if fusible:
                fused.add(block, terms, rate, decay)
            else:
                self._update_block(block, record, terms, rate, decay)
        fused.run()
        self.directions.learn(self, record)

    @staticmethod
    def _decay_of(group: dict[str, Any], block: Block) -> float:
        return float(group["weight_decay"]) if len(block.shape) > 1 else 0.0

    def _update_block(self, block: Block, record: StepRecord, terms: Sequence[Term], lr: float, decay: float) -> None:
        """Move ``block`` along ``terms`` by the rule: a sweep over its pieces, each rounded once."""

        def update(theta: torch.Tensor, lo: int, hi: int) -> None:
            work = self._buffers.take("probe", hi - lo, theta.dtype, theta.device)
            probes = []
            for coefficient, direction in terms:
                ((_, _, z, factor),) = direction.windows(block, lo, hi)
                probes.append(ProbePiece(coefficient, z, factor, work))
            if decay:
                theta.mul_(1 - decay)
            self.rule.update(self, Piece(theta, probes, lr, block, lo, hi))

        self.sweep(block, fused_update.dither_key(block, record), record.seed, update)

    def _master(self, block: Block) -> torch.Tensor | None:
        """The float32 copy of the half-precision ``block``, flat; None where it has none."""
        if not self._master_weights or block.parameter.dtype not in HALF:
            return None
        state = self.state_of(block)
        if "master" not in state:
            state["master"] = block.parameter.detach().float()
        master: torch.Tensor = state["master"]
        return master.view(-1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; state tensors keep their dtype, whatever the dtype of the weights."""
        super().load_state_dict(state_dict)
        self.scratch = {}
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, block in zip(indices, self.blocks, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[block.parameter][key] = value.to(block.parameter.device, copy=True)
