"""The engine of every zeroth-order method: measure a step into a record, apply a record to the weights."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from zoft.blocks import Block, trainable_blocks
from zoft.errors import ConfigError, ModelError
from zoft.noise import Direction, chunk_length, places
from zoft.optim.record import StepRecord
from zoft.perturb import PerturbedWeights, verify_coverage
from zoft.precision import DITHER_SIZE, HALF, dither_table, round_stochastically

Closure = Callable[[], Any]
Parameters = torch.nn.Module | Iterable[Any]


class ProbePiece(NamedTuple):
    """A probe on a piece of a block: there ``u = factor * z``, and ``slope`` is the probe's slope over q."""

    slope: float
    z: torch.Tensor
    factor: float


class ZOOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that needs forward passes only.

    ``step(closure)`` is ``record = measure(closure)``, hand the record to ``journal``, ``apply(record)``. ``measure``
    needs data and only reads the weights; ``apply`` needs the weights and no data, so a list of records replays a run
    bit for bit. A method is a subclass: it gives the direction of a probe and the rule that updates a piece of a block.

    Args:
        params: a model (its trainable blocks), named parameters, or parameter groups of these.
        lr: learning rate, may be set per group and changed by a scheduler.
        eps: probe radius, in units of the weights.
        probes: directions measured and averaged in a step, q.
        weight_decay: decoupled; on blocks of two or more dimensions only, so not on norms and biases.
        seed: run seed; the noise is a function of (seed, step, probe, block name) and touches no global generator.
        master_weights: keep half-precision weights in float32 too and update that copy (twice their memory more).
        journal: called with every record before it is applied.
    """

    needs_gradient = False  # whether a record alone moves nothing (`zoft.optim.first_order`)

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
        journal: Callable[[StepRecord], None] | None = None,
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
        super().__init__(_named_groups(params), defaults)
        self.journal = journal
        self._master_weights = master_weights
        self._verified = False
        self.blocks = [block for group in self.param_groups for block in _blocks_of(group)]
        _check_blocks(self.blocks)
        self._table_dtype = _commonest_dtype(self.blocks)

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
        scales = self._scales()
        losses = []
        for probe in range(group["probes"]):
            direction = self._direction(group["seed"], group["step"], probe, scales)
            losses.append(tuple(self._evaluate(closure, direction, eps) for eps in (group["eps"], -group["eps"])))
        return StepRecord(
            step=group["step"],
            seed=group["seed"],
            lr=tuple(float(g["lr"]) for g in self.param_groups),
            eps=group["eps"],
            losses=tuple((pos, neg) for pos, neg in losses),
            scales=scales,
        )

    @torch.no_grad()
    def apply(self, record: StepRecord) -> None:
        """Update the weights by ``record``: a function of the weights and the record alone.

        The arithmetic is fixed: in float32 (float64 for float64 weights), every product and sum rounded by itself, none
        fused, probes in order; then one rounding to the dtype of the weights, stochastic for half precision.
        """
        step = self.param_groups[0]["step"]
        if record.step != step:
            raise ConfigError(f"the record is of step {record.step}, the optimizer is at step {step}")
        if not record.skipped:
            directions = [
                self._direction(record.seed, record.step, probe, record.scales) for probe in range(len(record.losses))
            ]
            for group, lr in zip(self.param_groups, record.lr, strict=True):
                for block in _blocks_of(group):
                    decay = lr * group["weight_decay"] if len(block.shape) > 1 else 0.0
                    self._update_block(block, record, directions, lr, decay)
        self.observe(record)
        for group in self.param_groups:
            group["step"] = step + 1

    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step and return the mean of the measured losses."""
        record = self.measure(closure)
        if self.journal is not None:
            self.journal(record)
        self.apply(record)
        return record.loss

    def verify(self, closure: Closure) -> str | None:
        """Check that perturbing on use gives what perturbing in place gives (`zoft.perturb.verify_coverage`)."""
        self._verified = True
        return verify_coverage(self.blocks, closure)

    # -- what a method defines ----------------------------------------------------------------------------------------

    def observe(self, record: StepRecord) -> None:
        """Take over what the next step reads of ``record``; also called for the last record before a snapshot."""

    def _scales(self) -> tuple[float, ...] | None:
        """The scale of every block at the present weights; None where all are 1."""
        return None

    def _direction(self, seed: int, step: int, probe: int, scales: tuple[float, ...] | None) -> Direction:
        """The direction of one probe."""
        named = None if scales is None else dict(zip((b.name for b in self.blocks), scales, strict=True))
        return Direction(seed, step, probe, named, self._table_dtype)

    def _update(self, theta: torch.Tensor, probes: Sequence[ProbePiece], lr: float) -> None:
        """Update a piece ``theta`` of a block in place."""
        raise NotImplementedError

    # -- sweeping over a block ----------------------------------------------------------------------------------------

    def _evaluate(self, closure: Closure, direction: Direction, eps: float) -> float:
        with PerturbedWeights(self.blocks, direction, eps):
            return float(closure())

    def _update_block(
        self, block: Block, record: StepRecord, directions: list[Direction], lr: float, decay: float
    ) -> None:
        slopes = [slope / len(directions) for slope in record.slopes]
        if not any(slopes) and not decay:
            return
        weights = block.parameter.detach().view(-1)
        master = self._master(block)
        target = weights if master is None else master
        work_dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        length = chunk_length(block)
        dither = _Dither(block, record, length) if target.dtype in HALF else None
        for lo in range(0, block.size, length):
            hi = min(block.size, lo + length)
            theta = target[lo:hi].to(work_dtype)  # the stored piece itself where it has that dtype
            probes = []
            for slope, direction in zip(slopes, directions, strict=True):
                ((_, _, z, factor),) = direction.pieces(block, lo, hi)
                probes.append(ProbePiece(slope, z.to(work_dtype), factor))
            if decay:
                theta.mul_(1 - decay)
            self._update(theta, probes, lr)
            if dither is not None:
                target[lo:hi] = round_stochastically(theta, dither.piece(lo, hi), target.dtype)
            if master is not None:
                weights[lo:hi] = theta

    def _master(self, block: Block) -> torch.Tensor | None:
        if not self._master_weights or block.parameter.dtype not in HALF:
            return None
        state = self.state[block.parameter]
        if "master" not in state:
            state["master"] = block.parameter.detach().float()
        return state["master"].view(-1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; state tensors keep their dtype, whatever the dtype of the weights."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, block in zip(indices, self.blocks, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[block.parameter][key] = value.to(block.parameter.device, copy=True)


class _Dither:
    """The seeded uniform numbers that round the update of one block in one step."""

    def __init__(self, block: Block, record: StepRecord, length: int) -> None:
        self._table = dither_table(record.seed, block.parameter.device)
        self._length = length
        key = f"{record.seed}/{record.step}/dither/{block.name}"
        self._offsets, _ = places(key, -(-block.size // length), DITHER_SIZE)

    def piece(self, lo: int, hi: int) -> torch.Tensor:
        offset = int(self._offsets[lo // self._length])
        return self._table[offset : offset + hi - lo]


def _named_groups(params: Parameters) -> list[dict[str, Any]]:
    """Parameter groups of (name, parameter) pairs; unnamed parameters are named by their position."""
    if isinstance(params, torch.nn.Module):
        return [{"params": [(block.name, block.parameter) for block in trainable_blocks(params)]}]
    given = list(params)
    groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    named, position = [], 0
    for group in groups:
        members = group["params"]
        pairs = []
        for member in [members] if isinstance(members, torch.Tensor) else members:
            pairs.append(member if isinstance(member, tuple) else (str(position), member))
            position += 1
        named.append({**group, "params": pairs})
    return named


def _blocks_of(group: dict[str, Any]) -> list[Block]:
    return [Block(name, p) for name, p in zip(group.get("param_names", ()), group["params"], strict=True)]


def _check_blocks(blocks: list[Block]) -> None:
    if not any(block.size for block in blocks):
        raise ModelError("no trainable parameters: every parameter has requires_grad=False")
    names = [block.name for block in blocks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"two blocks have the same name, {twice[0]!r}: the noise of a block is a function of its name")
    for block in blocks:
        if not block.parameter.is_floating_point():
            raise ModelError(f"block {block.name!r} has dtype {block.parameter.dtype}: expected a floating-point dtype")
        if not block.parameter.is_contiguous():
            raise ModelError(
                f"block {block.name!r} is not contiguous: set parameter.data = parameter.data.contiguous()"
            )


def _commonest_dtype(blocks: list[Block]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for block in blocks:
        sizes[block.parameter.dtype] = sizes.get(block.parameter.dtype, 0) + block.size
    return max(sizes, key=lambda dtype: sizes[dtype])
