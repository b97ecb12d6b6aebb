"""Perturb weights when they are read: stored weights do not change while a probe is measured.

`PerturbedWeights` intercepts every torch function that reads a block and passes ``theta + eps * u`` instead, in a
temporary of one layer's size. Tied heads, layers called twice and weights read outside their owner's
``forward`` are perturbed alike, because tensors are recognised, not modules. There is nothing to restore, not even
after an exception.

Code that reads weights without torch functions (a scripted function, a cache of transposed weights) is not intercepted:
`verify_coverage` detects it by an in-place evaluation.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

import torch
from torch.nn import functional

from zoft.memory import Buffers
from zoft.weights import products
from zoft.weights.blocks import Block

SLICE = {"cpu": 2**20}  # weights perturbed at a time in one layer: fits into the second-level cache of a core
SLICE_ELSEWHERE = 2**26

_CONTENT_PROPERTIES = {"data", "T", "mT", "H", "mH", "real", "imag"}
_SHAPE_METHODS = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.element_size,
    torch.Tensor.data_ptr,
    torch.Tensor.__len__,
    torch.Tensor.__hash__,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
}


class WeightSource(Protocol):
    """Source of perturbed weights, such as `zoft.noise.direction.Direction` or the bit flips of `verify_coverage`."""

    def perturb(self, block: Block, start: int, stop: int, eps: float, out: torch.Tensor) -> torch.Tensor:
        """Write the flat range ``start:stop`` of the perturbed block into the flat ``out`` and return it."""
        ...

    def perturb_rows(self, block: Block, rows: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the given rows of the perturbed block."""
        ...


def _reads_no_content(func: Callable[..., Any]) -> bool:
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func, "__self__", None).__name__ not in _CONTENT_PROPERTIES  # type: ignore[union-attr]
    return func in _SHAPE_METHODS


class ReplacedWeights:
    """Context in which functions read something else instead of the ``blocks``; other tensors are not affected.

    While it is active, the parameters have a class with ``__torch_function__``, so that torch itself finds functions
    that read a block, and nothing else in a forward pass is slowed down. Of nested contexts the inner one acts first.
    Functions compiled by `torch.compile` run eagerly: compiled graphs would read the stored weights.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = {id(block.parameter): block for block in blocks}
        self._classes: dict[type, type] = {}

    def __enter__(self) -> Self:
        self._uncompiled = _uncompiled()
        self._uncompiled.__enter__()
        for block in self._blocks.values():
            self._watch(block.parameter)
        return self

    def __exit__(self, *error: Any) -> None:
        for block in self._blocks.values():
            _unwatch(block.parameter)
        self._uncompiled.__exit__(*error)

    def _watch(self, parameter: torch.nn.Parameter) -> None:
        plain = type(parameter)
        if plain not in self._classes:
            # A class is part of a reference cycle: one that held this context would hold its buffers until the next gc.
            context = weakref.proxy(self)

            def intercept(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return context._intercept(func, args, kwargs or {})

            metaclass: Any = type(plain)
            members: dict[str, Any] = {"__torch_function__": classmethod(intercept)}
            self._classes[plain] = metaclass(plain.__name__, (plain,), members)
        parameter.__class__ = self._classes[plain]

    def _intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with its blocks replaced; while it runs, they are read as outside this context."""
        read = list(self._read(args, kwargs))
        for parameter in read:
            _unwatch(parameter)
        try:
            return func(*args, **kwargs) if _reads_no_content(func) else self.read(func, args, kwargs)
        finally:
            for parameter in read:
                self._watch(parameter)

    def _read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.nn.Parameter]:
        """Yield the blocks' parameters among the arguments, each once."""
        found = {}
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if (block := self._find(item)) is not None:
                    found[block.name] = block.parameter
        yield from found.values()

    def replacement(self, block: Block) -> torch.Tensor:
        """Return the replacement of ``block``, of its shape."""
        raise NotImplementedError

    def read(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with every block among its arguments replaced."""
        return products.call(func, self._replaced(args), {key: self._replace(value) for key, value in kwargs.items()})

    def _find(self, value: Any) -> Block | None:
        return self._blocks.get(id(value))

    def _replaced(self, values: Sequence[Any]) -> list[Any]:
        return [self._replace(value) for value in values]

    def _replace(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._replaced(value)) if any(self._find(item) for item in value) else value
        block = self._find(value)
        return value if block is None else self.replacement(block)


def _uncompiled() -> AbstractContextManager[Any]:
    """Return the context in which functions compiled by `torch.compile` run eagerly."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and its import takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _unwatch(parameter: torch.nn.Parameter) -> None:
    parameter.__class__ = type(parameter).__base__  # type: ignore[assignment]


class PerturbedWeights(ReplacedWeights):
    """Context in which every read of a block returns ``theta + eps * u``.

    Args:
        blocks: the blocks to perturb; other tensors are not affected.
        source: computes the perturbed weights, such as a `zoft.noise.direction.Direction`.
        eps: signed probe radius.

    ``used`` holds the names of the blocks that were read.
    """

    def __init__(self, blocks: Sequence[Block], source: WeightSource, eps: float) -> None:
        super().__init__(blocks)
        self._source, self._eps = source, eps
        self._buffers = Buffers()
        self.used: set[str] = set()

    def read(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with perturbed blocks: a product in slices, an embedding with only the rows looked up."""
        if func is functional.linear and len(args) >= 2 and self._find(args[1]):
            return self._linear(*args, **kwargs)
        if (
            func is functional.embedding
            and len(args) >= 2
            and (block := self._find(args[1]))
            and self._plain(args, kwargs)
        ):
            self.used.add(block.name)
            return self._source.perturb_rows(block, args[0], self._eps)
        return super().read(func, args, kwargs)

    @staticmethod
    def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether an embedding call only looks up rows, without renormalising by ``max_norm``."""
        return kwargs.get("max_norm", args[3] if len(args) > 3 else None) is None

    def replacement(self, block: Block) -> torch.Tensor:
        """Return ``theta + eps * u`` for the whole block."""
        self.used.add(block.name)
        out = torch.empty(block.size, dtype=block.parameter.dtype, device=block.parameter.device)
        return self._source.perturb(block, 0, block.size, self._eps, out).view(block.shape)

    def _linear(self, x: torch.Tensor, weight: torch.nn.Parameter, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x W'^T + b'`` with ``W'`` computed in slices of rows, each multiplied while it is in cache."""
        block = self._find(weight)
        assert block is not None
        self.used.add(block.name)
        bias = self._replace(bias)
        outputs, width = block.shape
        step = max(1, SLICE.get(weight.device.type, SLICE_ELSEWHERE) // width)
        if step >= outputs:
            return products.call(functional.linear, (x, self._rows(block, 0, outputs), bias), {})
        flat = x.reshape(-1, width)  # torch would copy the weights for every row of a non-contiguous batch
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)  # which does not affect products with ``out=``
        y = x.new_empty(len(flat), outputs, dtype=torch.get_autocast_dtype(device) if autocast else x.dtype)
        for start in range(0, outputs, step):
            stop = min(outputs, start + step)
            rows, to = self._rows(block, start, stop), y[:, start:stop]
            part = None if bias is None else bias[start:stop]
            if autocast:
                to.copy_(functional.linear(flat, rows, part))
            elif part is None:
                products.call(torch.mm, (flat, rows.T), {"out": to})
            else:
                products.call(torch.addmm, (part, flat, rows.T), {"out": to})
        return y.view(*x.shape[:-1], outputs)

    def _rows(self, block: Block, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start:stop`` of a perturbed matrix, in a buffer that the next call reuses."""
        width = block.shape[-1]
        out = self._buffers.take("rows", (stop - start) * width, block.parameter.dtype, block.parameter.device)
        return self._source.perturb(block, start * width, stop * width, self._eps, out).view(-1, width)
