"""Copy weights from host memory or disk to the device for each function that reads them, forward and backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

from zoft.weights.reading import Layer

_LOOKUPS = {functional.embedding, torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select}
_MOVES = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.__setitem__, torch.Tensor.type_as}


def devices_of(model: torch.nn.Module) -> list[torch.device]:
    """Return the devices of ``model``, accelerators first: the first one is where it computes."""
    found = dict.fromkeys(tensor.device for tensor in chain(model.parameters(), model.buffers()))
    return sorted(found, key=lambda device: device.type == "cpu")


def streaming(model: torch.nn.Module, *, again: bool = False) -> AbstractContextManager[Any]:
    """Return the context for running ``model``: `StreamedWeights` if some weights are not on its device, else none.

    ``again``: a part of it is recomputed in a backward pass (activation checkpointing).
    """
    hosted = any(parameter.device.type == "cpu" for parameter in model.parameters())
    return StreamedWeights(again=again) if hosted and devices_of(model)[0].type != "cpu" else nullcontext()


class StreamedWeights(Layer):
    """Layer in which a function with arguments in host memory and on a device gets all of them on the device.

    For a lookup the indices are copied to the table instead. The replacement of a block (`ReplacedWeights`) is computed
    in host memory and copied from there. A copy is freed after the function, and made again if the backward pass reads
    it; with ``again`` copies are kept, since a recomputed layer is differentiated at once.
    """

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self._sources: dict[StorageWeakRef, torch.Tensor] = {}
        self._saving = nullcontext() if again else saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> Self:
        self._saving.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._saving.__exit__(*error)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func`` with its arguments on one device."""
        device = target_device(args, kwargs)
        if device is None or func in _MOVES or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        if func in _LOOKUPS:
            table = args[1] if func is functional.embedding else args[0]
            device = table.device

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value if value.device == device else copy_to_device(value, device, func, self.note)
            return type(value)(map(moved, value)) if isinstance(value, (tuple, list)) else value

        return func(*map(moved, args), **{key: moved(value) for key, value in kwargs.items()})

    def note(self, copy: torch.Tensor, source: torch.Tensor) -> None:
        """Remember the ``source`` of ``copy`` for as long as ``copy`` exists."""
        if torch.is_grad_enabled() and source.device.type == "cpu":
            self._sources = {ref: other for ref, other in self._sources.items() if not ref.expired()}
            self._sources[StorageWeakRef(copy.untyped_storage())] = source.detach()

    def _pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Copied":
        source = self._sources.get(StorageWeakRef(tensor.untyped_storage()))
        if source is None:
            return tensor
        return _Copied(source, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset())


class _Copied(NamedTuple):
    """A saved tensor that the backward pass makes again: a view of a copy of ``source`` on a device."""

    source: torch.Tensor
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(kept: torch.Tensor | _Copied) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    return kept.source.to(kept.device).as_strided(kept.shape, kept.stride, kept.offset)


def copy_to_device(
    tensor: torch.Tensor,
    device: torch.device,
    reader: Callable[..., Any],
    note: Callable[[torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """Return a copy of ``tensor`` on ``device`` for ``reader``; as a torch function, it is seen by `ReplacedWeights`.

    ``note`` is called with the copy and its source.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(copy_to_device, (tensor,), tensor, device, reader, note)
    copy = tensor.to(device)
    note(copy, tensor)
    return copy


def target_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the accelerator among the devices of the arguments; None if all are on one device."""
    devices = {tensor.device for tensor in tensors_in((*args, *kwargs.values())) if tensor.ndim}
    if len(devices) < 2 or all(device.type != "cpu" for device in devices):
        return None
    return next(device for device in devices if device.type != "cpu")


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors among ``values``, also in tuples and lists."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found
