"""The exact gradient of a model's head, its bias and the norm before it, from the numbers of a forward pass.

A loss that reads logits ends in ``logits = W h + b``. With ``e = dL/dlogits``, which autograd of the loss function
alone gives, ``dL/dW = e^T h`` and ``dL/db = sum e``; the gradient of the final norm follows from ``e W`` by autograd
through that norm alone. There is no backward pass through the model, and no activation is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from zoft.errors import ConfigError, ModelError
from zoft.weights.blocks import Block
from zoft.weights.dtypes import work_dtype
from zoft.weights.perturbed import SLICE, SLICE_ELSEWHERE
from zoft.weights.products import call_widened
from zoft.weights.reading import BlockLayer


@dataclass(frozen=True)
class Head:
    """The blocks whose gradient a forward pass gives.

    Attributes:
        weight: the output embedding ``(vocabulary, width)``; a tied one is the input embedding, too.
        bias: its bias ``(vocabulary,)``, where there is one and it is trained.
        norm: the module whose output the head reads, where there is one and its weights are trained.
        vectors: the blocks of the norm by the names of its parameters.
    """

    weight: Block
    bias: Block | None = None
    norm: torch.nn.Module | None = None
    vectors: tuple[tuple[str, Block], ...] = ()

    @property
    def blocks(self) -> list[Block]:
        """All of them."""
        return [self.weight, *([self.bias] if self.bias else []), *(block for _, block in self.vectors)]


def head_of(model: torch.nn.Module, blocks: Sequence[Block]) -> Head:
    """Return the head of ``model``, without the norm.

    Raises:
        ModelError: the model has no output embedding, or it is not one of ``blocks``.
    """
    find = getattr(model, "get_output_embeddings", None)
    module: Any = find() if find is not None else None
    if module is None or getattr(module, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no output embedding (get_output_embeddings), so no exact head")
    known = {id(block.parameter): block for block in blocks}
    weight = known.get(id(module.weight))
    if weight is None:
        raise ModelError(
            "the head of this model is not trained (it is frozen, as everything is around an adapter), so it needs no "
            "gradient: leave out the exact head"
        )
    return Head(weight, known.get(id(getattr(module, "bias", None))))


def with_norm(head: Head, model: torch.nn.Module, blocks: Sequence[Block], closure: Callable[[], Any]) -> Head:
    """Return ``head`` with the norm before it, found by evaluating ``closure`` once.

    The norm is the last module of vectors alone that runs before the head, if rows of its output are what the head
    reads, and if it runs once for every time that the head does.

    Raises:
        ModelError: the closure reads the head in another way than as a linear layer.
    """
    known = {id(block.parameter): block for block in blocks}
    search = _Search(head)
    candidates = [module for module in model.modules() if _of_vectors(module, known)]
    with torch.no_grad(), _hooked(candidates, search.note), search:
        closure()
    if not search.read_head:
        raise ModelError(
            f"the objective does not read {head.weight.name} as the weight of a linear layer, so the exact head has no "
            "logits to start from: take --exact none"
        )
    norm = search.found
    if norm is None or search.runs[id(norm)] != search.read_head:
        return head
    return replace(head, norm=norm, vectors=tuple((name, known[id(p)]) for name, p in norm.named_parameters()))


def _of_vectors(module: torch.nn.Module, known: dict[int, Block]) -> bool:
    """Whether ``module`` has parameters, all of them trained vectors of its own."""
    parameters, own = list(module.parameters()), list(module.parameters(recurse=False))
    return bool(own) and len(own) == len(parameters) and all(p.ndim == 1 and id(p) in known for p in own)


@contextmanager
def _hooked(modules: Iterable[torch.nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Run ``hook`` after every forward pass of ``modules``."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _HeadReads(BlockLayer):
    """Inside this context `logits` makes what every linear layer with the head's weight returns."""

    def __init__(self, head: Head) -> None:
        super().__init__([head.weight])

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``, which reads the head's weight."""
        if func is functional.linear and len(args) > 1 and self.find(args[1]):
            return self.logits(*args, **kwargs)
        return call_widened(func, args, kwargs)

    def logits(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of ``x``."""
        raise NotImplementedError


class _Search(_HeadReads):
    """Finds the norm; see `with_norm`."""

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self.runs: Counter[int] = Counter()
        self.read_head = 0
        self.found: torch.nn.Module | None = None
        self._last: tuple[torch.nn.Module, torch.Tensor] | None = None

    def note(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """Keep the output of a module of vectors until the next one runs."""
        self.runs[id(module)] += 1
        self._last = (module, output) if isinstance(output, torch.Tensor) else None

    def logits(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compare ``x`` with the output that was kept."""
        self.read_head += 1
        if self._last is not None and self._last[1].shape[-1] == x.shape[-1]:
            module, output = self._last
            rows = output.reshape(-1, x.shape[-1])
            read = x.reshape(-1, x.shape[-1])[[0, -1]]
            if all(bool((rows == row).all(dim=1).any()) for row in read):
                self.found = module
        self._last = None
        return call_widened(functional.linear, (x, weight, bias), {})


@dataclass
class _Read:
    """One read of the head: its input, its logits (a leaf), and input and output (a leaf) of the norm before it."""

    hidden: torch.Tensor
    logits: torch.Tensor
    norm_input: torch.Tensor | None
    normed: torch.Tensor | None


class _Tap(_HeadReads):
    """Makes logits, and the output of the norm, leaves of autograd's graph, and keeps them in ``reads``."""

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self.reads: list[_Read] = []
        self._norm: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def note(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Start the graph behind the norm: of what lies between it and the head, mostly a choice of positions."""
        leaf = output.detach().requires_grad_()
        self._norm = inputs[0].detach(), leaf
        return leaf

    def logits(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits as a leaf: no product with the head's weight is in the graph."""
        leaf: torch.Tensor = call_widened(functional.linear, (x.detach(), weight, bias), {}).detach()
        self.reads.append(_Read(x, leaf.requires_grad_(), *self._norm))
        return leaf


class HeadGradient:
    """A sum of gradients by the blocks of a head, in float32 (float64 for float64 weights).

    Where only some rows of the head move, theirs is kept; else the factors ``e`` (positions, vocabulary) and ``h``
    (positions, width) of ``e^T h``, until they would outweigh it.

    Args:
        head: the head, with its norm.
        rows: rows of the head that move; None: all.
    """

    def __init__(self, head: Head, rows: torch.Tensor | None) -> None:
        self._head, self._rows = head, rows
        self._dtype = work_dtype(head.weight.parameter.dtype)
        self._factors: list[tuple[float, torch.Tensor, torch.Tensor]] = []
        self._dense: torch.Tensor | None = None
        self.vectors: dict[str, torch.Tensor] = {}  # of the bias (its rows that move) and the norm, by block name

    def take(self, e: torch.Tensor, h: torch.Tensor) -> None:
        """Add ``e^T h`` and ``sum e``, of the rows that move."""
        if self._rows is None:
            self._factors.append((1.0, e, h))
            self._fold_if_large()
        else:
            e = e[:, self._rows].to(self._dtype)
            self._add_dense(e.T @ h.to(self._dtype))
        if self._head.bias is not None:
            self.add_vector(self._head.bias, e.sum(dim=0, dtype=self._dtype))

    def add_vector(self, block: Block, gradient: torch.Tensor) -> None:
        """Add the gradient of a bias or of a norm's weight."""
        gradient = gradient.to(self._dtype)
        self.vectors[block.name] = self.vectors[block.name] + gradient if block.name in self.vectors else gradient

    def add(self, other: HeadGradient, scale: float) -> None:
        """Add another sum times ``scale``; it is not used afterwards."""
        self._factors += [(factor * scale, e, h) for factor, e, h in other._factors]
        if other._dense is not None:
            self._add_dense(other._dense.mul_(scale))
        for name, gradient in other.vectors.items():
            self.vectors[name] = self.vectors[name] + gradient * scale if name in self.vectors else gradient * scale
        self._fold_if_large()

    def _add_dense(self, gradient: torch.Tensor) -> None:
        self._dense = gradient if self._dense is None else self._dense.add_(gradient)

    def _fold_if_large(self) -> None:
        """Turn factors of more positions than the head has columns into a matrix of the head's size."""
        if sum(len(e) for _, e, _ in self._factors) <= self._head.weight.shape[1]:
            return
        step = _rows_at_a_time(self._head.weight)
        rows, width = self._head.weight.shape
        self._add_dense(torch.zeros(rows, width, dtype=self._dtype, device=self._factors[0][1].device))
        assert self._dense is not None
        for lo in range(0, rows, step):
            for scale, e, h in self._factors:
                self._dense[lo : lo + step] += self._product(scale, e, h, lo, lo + step)
        self._factors.clear()

    def _product(self, scale: float, e: torch.Tensor, h: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        return (e[:, lo:hi].to(self._dtype).T @ h.to(self._dtype)).mul_(scale)

    def of_rows(self, lo: int, hi: int) -> torch.Tensor:
        """Return rows ``lo:hi`` of the head's gradient; where only some rows move, they are counted among these."""
        total = self._dense[lo:hi] if self._dense is not None else None
        for factors in self._factors:
            part = self._product(*factors, lo, hi)
            total = part if total is None else total + part
        if total is None:
            total = torch.zeros(hi - lo, self._head.weight.shape[1], dtype=self._dtype)
        return total

    def norm(self) -> float:
        """Return the length of the whole gradient: of the factors by ``|sum e^T h|^2 = sum of (E E^T) * (H H^T)``."""
        squares = [vector.double().square().sum() for vector in self.vectors.values()]
        if self._factors and self._dense is None:
            e = torch.cat([e for _, e, _ in self._factors]).to(self._dtype)
            h = torch.cat([h.to(self._dtype) * scale for scale, _, h in self._factors])
            squares.append(((e @ e.T).double() * (h @ h.T).double()).sum().clamp(min=0))
        elif self._dense is not None:
            rows = range(0, len(self._dense), step := _rows_at_a_time(self._head.weight))
            squares += [self.of_rows(lo, min(lo + step, len(self._dense))).double().square().sum() for lo in rows]
        return float(torch.stack([square.cpu() for square in squares]).sum().sqrt()) if squares else 0.0


def _rows_at_a_time(block: Block) -> int:
    return max(1, SLICE.get(block.parameter.device.type, SLICE_ELSEWHERE) // block.shape[1])


class HeadMeter:
    """Evaluates closures and takes the gradient by the head meanwhile, for one step.

    A closure returns a loss that autograd can differentiate. It may have a method ``parts`` that yields ``(sum,
    weight)`` of one micro-batch after the other, whose loss is the sum of sums over the sum of weights; then each is
    freed before the next is evaluated. `gradient` is the mean over the evaluations, or that at theta, if there was one.
    """

    def __init__(self, model: torch.nn.Module, head: Head, rows: torch.Tensor | None) -> None:
        self._model, self._head, self._rows = model, head, rows
        self._sum, self._count, self._at_theta = HeadGradient(head, rows), 0, False

    @property
    def settled(self) -> bool:
        """Whether the gradient at theta is known, which no other evaluation can better."""
        return self._at_theta

    def gradient(self) -> HeadGradient:
        """Return the mean over the evaluations."""
        mean = HeadGradient(self._head, self._rows)
        mean.add(self._sum, 1 / max(1, self._count))
        return mean

    def __call__(
        self, closure: Callable[[], Any], perturbed: AbstractContextManager[Any] | None = None
    ) -> torch.Tensor:
        """Return the loss of ``closure`` with weights ``perturbed``, or at theta, and add its gradient.

        Raises:
            ConfigError: it has no gradient.
        """
        if perturbed is None:
            self._sum, self._count, self._at_theta = HeadGradient(self._head, self._rows), 0, True
        found = HeadGradient(self._head, self._rows)
        total, weight = torch.zeros((), dtype=torch.float64), 0.0
        weights = self._head.weight.parameter.detach()
        tap, norm = _Tap(self._head), self._head.norm
        with ExitStack() as stack:
            stack.enter_context(_frozen(self._model))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(perturbed or nullcontext())
            stack.enter_context(_hooked([] if norm is None else [norm], tap.note))
            stack.enter_context(tap)
            for loss, share in _parts(closure):
                self._take(found, tap.reads, loss, weights)
                tap.reads.clear()
                total, weight = loss.detach().double().reshape(()) + total, weight + share
                del loss
        self._sum.add(found, 1 / weight)
        self._count += 1
        return total / weight

    def _take(self, found: HeadGradient, reads: Sequence[_Read], loss: Any, weights: torch.Tensor) -> None:
        """Add the gradient of ``loss``, which was computed from ``reads``."""
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise ConfigError(
                "the exact head takes the gradient of the loss by the logits, and this objective gives a number that "
                "has none: minimise the loss, or take --exact none"
            )
        slopes = torch.autograd.grad(loss, [read.logits for read in reads], allow_unused=True)
        for read, e in zip(reads, slopes, strict=True):
            if e is None:
                continue
            e, h = e.reshape(-1, e.shape[-1]), read.hidden.detach().reshape(-1, read.hidden.shape[-1])
            found.take(e, h)
            if self._head.norm is not None and read.normed is not None:
                self._take_norm(found, read, _times(e, weights))

    def _take_norm(self, found: HeadGradient, read: _Read, slope: torch.Tensor) -> None:
        """Add the gradient of the norm, of which ``slope`` is the gradient by the head's input."""
        slope = slope.view(read.hidden.shape).to(read.hidden.dtype)
        if read.normed is not None and read.hidden is not read.normed:
            (slope,) = torch.autograd.grad(read.hidden, [read.normed], slope)
        norm = self._head.norm
        assert norm is not None
        parameters = [block.parameter for _, block in self._head.vectors]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            gradients = torch.autograd.grad(norm.forward(read.norm_input), parameters, slope)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        for (_, block), gradient in zip(self._head.vectors, gradients, strict=True):
            found.add_vector(block, gradient)


def _parts(closure: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
    """The losses of ``closure`` and their weights."""
    parts = getattr(closure, "parts", None)
    if parts is None:
        yield closure(), 1.0
    else:
        yield from parts()


def _times(e: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``e W`` in float32 or better, some rows of W at a time."""
    dtype = work_dtype(weights.dtype)
    step = max(1, SLICE.get(weights.device.type, SLICE_ELSEWHERE) // weights.shape[1])
    total = torch.zeros(len(e), weights.shape[1], dtype=dtype, device=e.device)
    for lo in range(0, len(weights), step):
        total.addmm_(e[:, lo : lo + step].to(dtype), weights[lo : lo + step].to(e.device, dtype))
    return total


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Keep the parameters of ``model`` out of autograd's graph, which then begins at the leaves of a tap."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
