"""Reading: the layers through which torch functions read weights, and their order.

A call ``func(x, weight)`` goes through the active layers from top to bottom. A layer changes arguments or result, and
passes the call on by calling ``func``:

    func(x, weight)
      |     every function, by torch's stack of modes (`Layer`)             entered
      v
    Float32Vectors    vectors of half-precision models in float32           in the forward of the module that owns them
      v
    WidenedProducts   half-precision products in float32 slices             in the forward of the model
      v
    StreamedWeights   arguments on two devices copied to one of them        around a job
      |     functions that read a block, by the parameters' class (`BlockLayer`); of nested ones the inner first
      v
    ReplacedWeights   perturbed, rounded or rescaled blocks                 around an evaluation
      |     `call_widened`, called by `ReplacedWeights`: products of replaced blocks, which no mode sees any more
      v
    torch

The order follows from where layers are entered: of torch's modes the last entered acts first, and the classes of
arguments act after all modes. While a layer runs, the layers below it are active and it is not, so functions that it
calls itself go through the layers below.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, cast

import torch
from torch.overrides import TorchFunctionMode

from zoft.weights.blocks import Block

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


class Layer(TorchFunctionMode):
    """Context that sees every torch function called inside it; subclasses define `call`."""

    @classmethod
    def of(cls, module: torch.nn.Module) -> Self:
        """Return the layer for a forward pass of ``module``."""
        return cls()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with what this layer makes of its arguments, and return what it makes of the result."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(func, args, kwargs or {})


def run_in(module: torch.nn.Module, layer: type[Layer]) -> None:
    """Run every forward pass of ``module`` in ``layer.of(module)``, for every caller.

    Its class is replaced by a subclass of the same name: ``state_dict``, copies and saving work as before. Calling it
    again has no effect.
    """
    if not runs_in(module, layer):
        cls: Any = type(module)  # to mypy no class of torch is hashable
        module.__class__ = _running_in(cls, cast(Any, layer))


def runs_in(module: torch.nn.Module, layer: type[Layer]) -> bool:
    """Return whether forward passes of ``module`` run in ``layer``."""
    return layer in getattr(type(module), "_zoft_layers", ())


@functools.cache
def _running_in(cls: Any, layer: Any) -> Any:
    forward = cls.forward

    @functools.wraps(forward)
    def within(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with layer.of(self):
            return forward(self, *args, **kwargs)

    layers = (*getattr(cls, "_zoft_layers", ()), layer)
    members = {
        "forward": within,
        "_zoft_layers": layers,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return type(cls.__name__, (cls,), members)


class BlockLayer:
    """Context that sees the torch functions that read one of ``blocks``, and no others; subclasses define `call`.

    While it is active, the parameters have a class with ``__torch_function__``, so that torch itself finds functions
    that read a block, and nothing else in a forward pass is slowed down. Functions compiled by `torch.compile` run
    eagerly: compiled graphs would read the stored weights.
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

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``, which reads a block. While it runs, its blocks are read as outside this context."""
        raise NotImplementedError

    def find(self, value: Any) -> Block | None:
        """Return the block whose parameter ``value`` is, else None."""
        return self._blocks.get(id(value))

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
        read = list(self._read(args, kwargs))
        for parameter in read:
            _unwatch(parameter)
        try:
            return func(*args, **kwargs) if _reads_no_content(func) else self.call(func, args, kwargs)
        finally:
            for parameter in read:
                self._watch(parameter)

    def _read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.nn.Parameter]:
        """Yield the blocks' parameters among the arguments, each once."""
        found = {}
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if (block := self.find(item)) is not None:
                    found[block.name] = block.parameter
        yield from found.values()


def _unwatch(parameter: torch.nn.Parameter) -> None:
    parameter.__class__ = type(parameter).__base__  # type: ignore[assignment]


def _reads_no_content(func: Callable[..., Any]) -> bool:
    if getattr(func, "__name__", "") == "__get__":
        return getattr(func, "__self__", None).__name__ not in _CONTENT_PROPERTIES  # type: ignore[union-attr]
    return func in _SHAPE_METHODS


def _uncompiled() -> AbstractContextManager[Any]:
    """Return the context in which functions compiled by `torch.compile` run eagerly."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and its import takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
