"""Capture both ends of a probe as one CUDA graph, and replay it for other batches, steps and probes.

In eager mode the host issues every kernel of a forward pass, which for a small model takes most of the time. A graph
is issued at once. It reads tensors that stay where they are: before each replay the batch, and where the chunks of
every block read the noise table are copied into them. A graph computes what eager mode does, on a batch filled up to
one of few shapes (`zoft.tasks.buckets`). The update needs no graph: it is one kernel for all blocks.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from zoft.errors import ConfigError, ModelError
from zoft.memory import flatten, unflatten
from zoft.noise import fused
from zoft.noise.direction import NoiseDirection
from zoft.noise.table import ROW, Layout
from zoft.optim.core.oracle import Closure
from zoft.tasks.batches import readable_filler
from zoft.tasks.buckets import padded, shape_of
from zoft.tasks.losses import TrainingLoss, loss, weight
from zoft.tasks.types import Encoded
from zoft.weights.blocks import Block
from zoft.weights.perturbed import PerturbedWeights

SHAPES = 16  # graphs kept; what their forward passes need is one pool, as large as the largest asks for

Replay = Callable[[], torch.Tensor]


def check_blocks(blocks: Sequence[Block]) -> torch.device:
    """Return the device of ``blocks``; `ModelError` if they cannot be perturbed in a captured graph."""
    (device, *others) = {block.parameter.device for block in blocks}
    if others or not all(fused.supports(block.parameter.detach()) for block in blocks):
        where = ", ".join(sorted(map(str, (device, *others))))
        dtypes = ", ".join(sorted({str(block.parameter.dtype) for block in blocks}))
        raise ModelError(
            f"graphs=true needs all weights on one CUDA device where Triton works, in float32, bfloat16 or float16; "
            f"found {dtypes} on {where}: leave it out"
        )
    if wide := [block.name for block in blocks if len(block.shape) == 2 and block.shape[-1] > ROW]:
        raise ModelError(f"graphs=true perturbs no rows of more than {ROW} numbers, as {wide[0]} has: leave it out")
    return device


class SentDirection(NoiseDirection):
    """The direction of the last probe that was sent, read from tensors at fixed addresses."""

    def __init__(self, seed: int, table_dtype: torch.dtype, blocks: Sequence[Block]) -> None:
        super().__init__(seed, 0, 0, None, table_dtype, blocks)
        self._device = check_blocks(blocks)
        self._sent: fused.Places | None = None
        self._table = self.table(blocks[0])  # kept: a graph has its address

    def send(self, direction: NoiseDirection, eps: float) -> None:
        """Copy ``direction``, to be probed at ``eps``, to the device; the host does not wait."""
        rows, first = direction.place_rows(self.blocks, eps)
        if self._sent is None:
            self._sent = fused.Places(torch.empty(rows.shape, dtype=torch.int32, device=self._device), first)
        _overwrite(self._sent.rows, torch.from_numpy(rows))

    def places(self, block: Block, eps: float) -> fused.Places:
        """Return the places that were sent; ``eps`` is in them."""
        assert self._sent is not None
        return self._sent

    def layout(self, block: Block) -> Layout:
        """Fail: numbers of the host would be captured with the graph and never change again."""
        raise AssertionError(f"{block.name} takes the plain path, which no graph can replay")


class Ends:
    """A closure over tensors at fixed addresses, and the graph of its two ends, captured when first needed.

    It stands for the closure: with ``source = SentDirection(seed, optimizer.table_dtype, optimizer.blocks)`` a step is
    ``optimizer.step(Ends(closure, source))``. The numbers in the tensors may change between steps, their shapes and
    addresses may not. Ends of one ``source`` and one ``pool`` share their memory.
    """

    def __init__(self, closure: Closure, source: SentDirection, pool: Any = None) -> None:
        self._closure, self._source, self._pool = closure, source, pool
        self._replay: Replay | None = None

    def __call__(self) -> Any:
        """Evaluate the closure, eagerly."""
        return self._closure()

    def both(self, direction: NoiseDirection, eps: float) -> torch.Tensor:
        """Return ``L(theta + eps u)`` and ``L(theta - eps u)``, ``(2,)`` float64, not waited for."""
        self._source.send(direction, eps)
        return self.replayed()

    def replayed(self) -> torch.Tensor:
        """As `both`, of the direction that the source was sent last."""
        if self._replay is None:
            self._replay = captured(self._evaluate, self._pool)
        return self._replay().clone()  # the next replay writes to the same place

    def _evaluate(self) -> torch.Tensor:
        ends = []
        for side in (1.0, -1.0):
            with PerturbedWeights(self._source.blocks, self._source, side):
                ends.append(torch.as_tensor(self._closure()).detach().double().reshape(()))
        return torch.stack(ends)


class BatchGraphs:
    """The ends of the training loss on batches: a graph for each shape, the latest `SHAPES` kept."""

    def __init__(self, model: Any, objective: TrainingLoss, source: SentDirection) -> None:
        self._model, self._objective, self._source = model, objective, source
        self._pool: Any = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self._kept: OrderedDict[tuple[object, ...], tuple[torch.Tensor, Ends]] = OrderedDict()

    def both(self, parts: Iterable[Sequence[Encoded]], direction: NoiseDirection, eps: float) -> torch.Tensor | None:
        """Return both ends of the mean over the micro-batches ``parts``; None where one of them cannot be packed."""
        parts = list(parts)
        rows = [[row for one in part for row in one.loss_rows] for part in parts]
        if not all(self._objective.sharing(self._model, p).joins(r) for p, r in zip(parts, rows, strict=True)):
            return None
        batches = [self._objective.host_batch(self._model, part) for part in parts]
        if not all(one.packed for one in batches):
            return None
        self._source.send(direction, eps)
        total = torch.zeros(2, dtype=torch.float64, device=self._model.device)
        for one in batches:
            full = padded(one, readable_filler(self._objective.filler, self._model))
            key = shape_of(full)
            if key not in self._kept:
                self._kept[key] = self._made(full)
            self._kept.move_to_end(key)
            tensors, ends = self._kept[key]
            _overwrite(tensors, flatten(full.arrays))
            total += ends.replayed()
            if len(self._kept) > SHAPES:
                self._kept.popitem(last=False)
        return total / sum(weight(self._objective.task, one) for one in batches)

    def _made(self, batch: Any) -> tuple[torch.Tensor, Ends]:
        """The tensors of a shape, one behind the other, and the ends of the loss on them."""
        flat = torch.empty_like(flatten(batch.arrays), device=self._model.device)

        def closure() -> torch.Tensor:
            return loss(self._model, self._objective.task, batch.batch(unflatten(flat, batch.arrays))).total

        return flat, Ends(closure, self._source, self._pool)


class BatchEnds:
    """The closure of a step of a run: ``eager()``, or the graphs of its micro-batches where there are both ends."""

    def __init__(self, eager: Closure, graphs: BatchGraphs, parts: Sequence[Sequence[Encoded]]) -> None:
        self._eager, self._graphs, self._parts = eager, graphs, parts

    def __call__(self) -> Any:
        """Evaluate the objective eagerly."""
        return self._eager()

    def both(self, direction: NoiseDirection, eps: float) -> torch.Tensor | None:
        """Return both ends of a probe, not waited for; None where they have to be evaluated eagerly."""
        return self._graphs.both(self._parts, direction, eps)


def captured(function: Replay, pool: Any) -> Replay:
    """Capture ``function``, which reads and returns tensors that stay where they are; replaying returns the latter.

    It runs three times first, on a side stream, as torch asks, so that kernels are compiled and libraries have made
    their workspaces. Graphs that share ``pool`` may be replayed in any order, if what one returns is copied before the
    next is replayed: nothing else in the pool outlives a replay.

    Raises:
        ModelError: it cannot be captured, or the graph gives other numbers.
    """
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = function().clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            returned = function()
    except RuntimeError as error:
        cause: BaseException = error  # ending a capture that failed is an error, too, which says less
        while cause.__context__ is not None:
            cause = cause.__context__
        reason = str(cause).splitlines()[0]
        raise ModelError(f"this model cannot be captured as a CUDA graph ({reason}); leave graphs=true out") from error

    def replay() -> torch.Tensor:
        graph.replay()
        return returned

    if not torch.allclose(replay(), expected, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ModelError(
            f"the captured graph of this model gives {returned.tolist()}, the same functions called one by one "
            f"{expected.tolist()}; leave graphs=true out"
        )
    return replay


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps a workspace of some megabytes for every stream it has seen."""
    return torch.cuda.Stream(device)


def check_settings(device: torch.device, device_map: object, objective: object) -> None:
    """Raise `ConfigError` if a run with these settings cannot use graphs, before anything is loaded."""
    if device.type != "cuda" or device_map is not None:
        where = "a device_map" if device_map is not None else f"the device {device}"
        raise ConfigError(f"graphs=true replays CUDA graphs and needs a model on one GPU, found {where}: leave it out")
    if objective != "loss":
        raise ConfigError(f'graphs=true captures the training loss, and the objective is "{objective}": leave it out')


def _overwrite(target: torch.Tensor, numbers: torch.Tensor) -> None:
    """Copy ``numbers`` of host memory into ``target``; the host does not wait for it."""
    target.copy_(numbers.pin_memory() if target.device.type == "cuda" else numbers, non_blocking=True)
