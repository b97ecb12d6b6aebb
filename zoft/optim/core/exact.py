"""`ExactHead`: the head, its bias and the final norm move along their exact gradient, with a rule of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field

from zoft.errors import ModelError, RunError
from zoft.optim.core.fused_update import dither_key
from zoft.optim.core.head import Head, HeadMeter, head_of, with_norm
from zoft.optim.core.parts import Host, Part
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block
from zoft.weights.dtypes import work_dtype

ROWS_LR = 2e-3  # where only the rows of the answers move
ALL_ROWS_LR = 1e-4
RECORDED = 2**17  # numbers of a gradient that a record holds at most: 700 KB in a journal


def default_lr(rows: tuple[int, ...] | None) -> float:
    """Return the learning rate of a head of which ``rows`` move, None: all."""
    return ALL_ROWS_LR if rows is None else ROWS_LR


class ExactHead(Part):
    """The exact gradient of the head, its bias and the final norm, in every step, at no further forward pass.

    These blocks leave the random direction (a tied embedding whole). The gradient is that at theta, where the step
    evaluates the objective there, else the mean of both ends of every probe, which differs by ``O(eps^2)``.

    The rule is Adam's, ``w <- w - lr m / sqrt(v)``, with moments corrected for their start at 0. Where all rows of the
    head move, ``v`` is one number a row, the mean of squares (AdaLomo, arXiv 2310.10195, has factors), and ``m``
    is the gradient: a state of the vocabulary's size.

    The record holds the gradient where that is small, in float32. Else it holds none, and going on after a
    snapshot measures the step again.

    Attributes:
        model: the model that the objective evaluates; its head is that of ``get_output_embeddings()``.
        rows: rows of the head, and of its bias, that move: the tokens of the answers. None: all.
        lr: learning rate; None: 2e-3 where ``rows`` are given, else 1e-4. ``exact_lr`` of the first parameter group is
            what a step takes.
        momentum: share of the last steps in the direction of a step; None: 0.9 where ``rows`` are given, else 0.
        beta: share of the last steps in the second moments.
        by_weight: whether there is a second moment for every weight, not one a row; None: where ``rows`` are given.
        floor: added to the root of the second moments.
    """

    model: torch.nn.Module
    rows: tuple[int, ...] | None = None
    lr: float | None = Field(None, ge=0)
    momentum: float | None = Field(None, ge=0, lt=1)
    beta: float = Field(0.98, ge=0, lt=1)
    floor: float = Field(1e-8, ge=0)
    by_weight: bool | None = None

    @property
    def default_lr(self) -> float:
        """The learning rate that steps begin with."""
        return default_lr(self.rows) if self.lr is None else self.lr

    def check(self, host: Host) -> None:
        """Raise `ModelError` where the model has no head that is trained, or the head has no such rows."""
        count = self._head(host).weight.shape[0]
        if self.rows is not None and not all(0 <= row < count for row in self.rows):
            found = f"{min(self.rows)} .. {max(self.rows)}"
            raise ModelError(f"the head has rows 0 to {count - 1}, and rows {found} are to move")

    def recorded(self, host: Host) -> bool:
        """Whether records hold the gradient."""
        return self.rows is not None and len(self.rows) * self._head(host).weight.shape[1] <= RECORDED

    def owned(self, host: Host) -> frozenset[str]:
        """Return the names of the blocks that this part moves, and that no direction does."""
        return frozenset(block.name for block in self._head(host).blocks)

    def prepare(self, host: Host, closure: Callable[[], Any]) -> None:
        """Find the final norm, by one evaluation of ``closure`` before the first step."""
        if "norm sought" not in host.scratch:
            host.scratch["head"] = with_norm(head_of(self.model, host.blocks), self.model, host.blocks, closure)
            host.scratch["norm sought"] = True

    def meter(self, host: Host) -> HeadMeter:
        """Return what takes the gradient while the objective is evaluated."""
        head = self._head(host)
        rows = None if self.rows is None else torch.tensor(self.rows, device=head.weight.parameter.device)
        return HeadMeter(self.model, head, rows)

    def measured(self, host: Host, record: StepRecord, meter: HeadMeter, lr: float) -> StepRecord:
        """Return ``record`` with the gradient and its norm; a gradient that is too large waits in ``host.scratch``."""
        gradient = meter.gradient()
        extra = {**record.extra, "exact_lr": lr, "exact_norm": gradient.norm()}
        if not self.recorded(host):
            host.scratch["gradient"] = record.step, gradient
            return replace(record, extra=extra)
        rows = gradient.of_rows(0, len(self.rows or ()))
        numbers = {self._head(host).weight.name: rows, **gradient.vectors}
        return replace(record, extra=extra, exact={name: _packed(tensor) for name, tensor in numbers.items()})

    def before(self, host: Host, record: StepRecord) -> None:
        """Take from ``record`` which norm moves, where no objective was evaluated: in a replay.

        Raises:
            RunError: the record holds no gradient, and the step was not measured just before.
        """
        waiting = host.scratch["gradient"][0] if "gradient" in host.scratch else None
        if not record.exact and not record.skipped and waiting != record.step:
            raise RunError(f"step {record.step}: its record holds no gradient of the head; measure the step again")
        if not record.exact:
            return
        if "norm sought" not in host.scratch:
            head, known = head_of(self.model, host.blocks), {block.name: block for block in host.blocks}
            own = {block.name for block in head.blocks}
            vectors = tuple((name, known[name]) for name in record.exact if name not in own and name in known)
            host.scratch["head"] = replace(head, vectors=vectors)
        sizes = {block.name: 4 * self._count(host, block) * _width(block) for block in self._head(host).blocks}
        if sizes != {name: len(raw) for name, raw in record.exact.items()}:
            raise RunError(f"step {record.step}: its gradients do not fit the head of this model ({', '.join(sizes)})")

    def apply(self, host: Host, record: StepRecord, decays: Mapping[str, float]) -> None:
        """Move the blocks; ``decays`` are weight decays by block name."""
        gradients = self._recorded_gradients(host, record) if record.exact else self._waiting_gradients(host)
        (lr,) = record.numbers("exact_lr")
        for block in self._head(host).blocks:
            self._move(host, block, record, gradients[block.name], lr, lr * decays.get(block.name, 0.0))

    def _head(self, host: Host) -> Head:
        if "head" not in host.scratch:
            host.scratch["head"] = head_of(self.model, host.blocks)
        head: Head = host.scratch["head"]
        return head

    def _by_rows(self, given: Any, some: Any, every: Any) -> Any:
        """A setting: ``given``, else ``some`` where only some rows of the head move, ``every`` where all do."""
        return given if given is not None else every if self.rows is None else some

    def _chosen(self, host: Host, block: Block) -> tuple[int, ...] | None:
        """The rows of ``block`` that move; None: all."""
        head = self._head(host)
        return self.rows if block in (head.weight, head.bias) else None

    def _count(self, host: Host, block: Block) -> int:
        """The number of rows of ``block`` that move."""
        chosen = self._chosen(host, block)
        return block.size // _width(block) if chosen is None else len(chosen)

    def _waiting_gradients(self, host: Host) -> dict[str, Any]:
        _, gradient = host.scratch.pop("gradient")
        return {self._head(host).weight.name: gradient.of_rows} | {
            name: _rows_of(vector.view(-1, 1)) for name, vector in gradient.vectors.items()
        }

    def _recorded_gradients(self, host: Host, record: StepRecord) -> dict[str, Any]:
        width = {block.name: _width(block) for block in self._head(host).blocks}
        return {name: _rows_of(_unpacked(raw).view(-1, width[name])) for name, raw in record.exact.items()}

    def _move(
        self,
        host: Host,
        block: Block,
        record: StepRecord,
        gradient: Callable[[int, int], torch.Tensor],
        lr: float,
        decay: float,
    ) -> None:
        """Update ``block``, in pieces of whole rows, each rounded once; a vector has rows of one number."""
        width, device = _width(block), block.parameter.device
        chosen = self._chosen(host, block)
        count = self._count(host, block)
        places = None if chosen is None else {row * width: i for i, row in enumerate(chosen)}
        dtype, state, steps = work_dtype(block.parameter.dtype), host.state_of(block), host.updates + 1
        momentum = self._by_rows(self.momentum, 0.9, 0.0)
        by_weight = self._by_rows(self.by_weight, True, False)
        columns = width if by_weight else 1
        second = state.setdefault("second", torch.zeros(count, columns, dtype=dtype, device=device))
        first = None
        if momentum:
            first = state.setdefault("first", torch.zeros(count, width, dtype=dtype, device=device))

        def update(theta: torch.Tensor, lo: int, hi: int) -> None:
            start = lo // width if places is None else places[lo]
            stop = start + (hi - lo) // width
            g = gradient(start, stop).to(device, dtype)
            squares = g.square() if by_weight else g.square().mean(dim=1, keepdim=True)
            second[start:stop].mul_(self.beta).add_(squares, alpha=1 - self.beta)
            root = (second[start:stop] / (1 - self.beta**steps)).sqrt_().add_(self.floor)
            if first is not None:
                g = first[start:stop].lerp_(g, 1 - momentum) / (1 - momentum**steps)
            if decay:
                theta.mul_(1 - decay)
            theta.view(-1, width).sub_(g * (lr / root))

        spans = None if places is None else [(place, place + width) for place in places]
        host.sweep(block, dither_key(block, record), record.seed, update, spans)


def _width(block: Block) -> int:
    return block.shape[-1] if len(block.shape) > 1 else 1


def _rows_of(matrix: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda lo, hi: matrix[lo:hi]


def _packed(tensor: torch.Tensor) -> bytes:
    """The numbers as little-endian float32."""
    return tensor.detach().cpu().numpy().astype("<f4").tobytes()


def _unpacked(raw: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float32))
