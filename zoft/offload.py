"""Models that do not fit one device: placed by accelerate, their weights kept where they are for good.

accelerate's own offloading puts new parameters into a module for each of its forward passes. A block has to stay the
tensor that it is: it is recognised by identity where it is perturbed, and swept where it is stored. So what accelerate
would keep on disk is mapped into memory from a file, which the system reads and writes as there is room; what it would
keep in host memory stays there; and `StreamedWeights` moves either to the device, perturbed or not, for the function
that reads it. Records and weights are those of a plain run.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

DeviceMap = str | dict[str, str | int]

_FILES = "zoft-weights-"
_LOOKUPS = {functional.embedding, torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select}
_MOVES = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.__setitem__, torch.Tensor.type_as}


def spelled_out(device_map: DeviceMap) -> DeviceMap:
    """Return ``device_map`` as accelerate takes it: in one line it may be ``disk``, or devices by module.

    >>> spelled_out("model=0, lm_head=disk")
    {'model': 0, 'lm_head': 'disk'}
    >>> spelled_out("disk"), spelled_out("auto")
    ({'': 'disk'}, 'auto')
    """
    if isinstance(device_map, str):
        if "=" not in device_map:
            return {"": "disk"} if device_map == "disk" else device_map
        pairs = (part.rpartition("=") for part in device_map.split(","))
        device_map = {module.strip(): device.strip() for module, _, device in pairs}
    return {module: int(device) if str(device).isdecimal() else device for module, device in device_map.items()}


@torch.no_grad()
def settle(model: torch.nn.Module) -> None:
    """Give the weights of ``model``, as accelerate has dispatched it, their places for good.

    accelerate's hooks, which wrap ``forward``, give way to torch's: modules on a device get their inputs there, and
    those in host memory or on disk hand their outputs to the device that they serve.
    """
    places: dict[str, Any] = model.__dict__.pop("hf_device_map", {})  # by which peft would dispatch the model again
    hooked = [(name, module, module._hf_hook) for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    for name, module, hook in hooked:
        device, offloaded = hook.execution_device, hook.offload
        values = {key: hook.weights_map[key] for key in dict(module.named_parameters(recurse=False)) if offloaded}
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)  # left by the removal; it would hide a class that is given later
        for key, value in values.items():
            on_disk = _place_of(name, places) == "disk"
            module._parameters[key] = torch.nn.Parameter(mapped(value) if on_disk else value)
        if not offloaded:
            module.register_forward_pre_hook(_inputs_to(device), with_kwargs=True)
        elif values:
            module.register_forward_hook(_output_to(device))
    if hooked:
        model.tie_weights()  # type: ignore[operator]


def _place_of(name: str, places: dict[str, Any]) -> Any:
    """What the longest prefix of ``name`` in a device map says."""
    found = [key for key in places if key in ("", name) or name.startswith(f"{key}.")]
    return places[max(found, key=len)]


def _inputs_to(device: Any) -> Callable[..., Any]:
    return lambda module, inputs, keywords: (send_to_device(inputs, device), send_to_device(keywords, device))


def _output_to(device: Any) -> Callable[..., Any]:
    return lambda module, inputs, output: send_to_device(output, device)


def mapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in a file that is mapped into memory, for reading and writing, and vanishes with the process.

    It is made in the folder for temporary files (TMPDIR).

    >>> mapped(torch.tensor([[1.0, 2.0]])).mul_(2)
    tensor([[2., 4.]])
    """
    return _zeros_in_file(tensor).copy_(tensor)


def in_file(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is in a file of `mapped`."""
    return Path(tensor.untyped_storage().filename or "").name.startswith(_FILES)


def zeros_beside(tensor: torch.Tensor) -> torch.Tensor:
    """Return zeros like ``tensor`` where that is: on its device, in host memory, or in a file."""
    return _zeros_in_file(tensor) if in_file(tensor) else torch.zeros_like(tensor)


def _zeros_in_file(tensor: torch.Tensor) -> torch.Tensor:
    with tempfile.NamedTemporaryFile(prefix=_FILES) as file:
        file.truncate(tensor.nbytes)
        out = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return out.view(tensor.shape)


def devices_of(model: torch.nn.Module) -> list[torch.device]:
    """Return the devices that ``model`` lies on, those beside the host first: the first one is where it computes."""
    found = dict.fromkeys(tensor.device for tensor in chain(model.parameters(), model.buffers()))
    return sorted(found, key=lambda device: device.type == "cpu")


def second_copy(model: torch.nn.Module) -> tuple[torch.device, DeviceMap | None]:
    """Return device and device map of another copy of ``model``: where it is, but never twice on one of its devices.

    Of a model on several devices it is in host memory, or on disk where a part of the model is there.
    """
    devices = devices_of(model)
    if any(map(in_file, model.parameters())):
        return torch.device("cpu"), {"": "disk"}
    return (devices[0] if len(devices) == 1 else torch.device("cpu")), None


def streaming(model: torch.nn.Module, *, again: bool = False) -> AbstractContextManager[Any]:
    """Return the context that ``model`` has to run in: it moves weights where they are not where they are used.

    ``again``: a part of it runs a second time, inside a backward pass, for the activations that were not kept.
    """
    hosted = any(parameter.device.type == "cpu" for parameter in model.parameters())
    return StreamedWeights(again=again) if hosted and devices_of(model)[0].type != "cpu" else nullcontext()


class StreamedWeights(TorchFunctionMode):
    """Inside this context a function that reads tensors in host memory beside others gets copies of them on the device.

    A lookup goes the other way: its indices come to the table. Of blocks that are replaced meanwhile
    (`zoft.perturb.ReplacedWeights`) the replacement is made in host memory, and copied from there. A copy is gone after
    the function: a backward pass that reads it again has it copied again, but ``again``, where everything is kept that
    runs for the second time.
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

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        device = _device_of(args, kwargs)
        if device is None or func in _MOVES or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        if func in _LOOKUPS:
            table = args[1] if func is functional.embedding else args[0]
            device = table.device

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value if value.device == device else sent(value, device, func, self._note)
            return type(value)(map(moved, value)) if isinstance(value, (tuple, list)) else value

        return func(*map(moved, args), **{key: moved(value) for key, value in kwargs.items()})

    def _note(self, copy: torch.Tensor, source: torch.Tensor) -> None:
        """Know ``copy``, as long as it is there, for one of ``source``."""
        if torch.is_grad_enabled() and source.device.type == "cpu":
            self._sources = {ref: other for ref, other in self._sources.items() if not ref.expired()}
            self._sources[StorageWeakRef(copy.untyped_storage())] = source.detach()

    def _pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Copied":
        source = self._sources.get(StorageWeakRef(tensor.untyped_storage()))
        if source is None:
            return tensor
        return _Copied(source, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset())


class _Copied(NamedTuple):
    """What a backward pass makes a tensor from: a view of the copy of ``source`` on a device."""

    source: torch.Tensor
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _unpack(kept: torch.Tensor | _Copied) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    return kept.source.to(kept.device).as_strided(kept.shape, kept.stride, kept.offset)


def sent(
    tensor: torch.Tensor,
    device: torch.device,
    reader: Callable[..., Any],
    note: Callable[[torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """Return ``tensor`` on ``device`` for ``reader``; a torch function, so that what replaces weights sees who reads.

    ``note`` is told of the copy and of what it is one of.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(sent, (tensor,), tensor, device, reader, note)
    copy = tensor.to(device)
    note(copy, tensor)
    return copy


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device beside the host that tensors among the arguments are on; None where all are in one place."""
    devices = {tensor.device for tensor in _tensors((*args, *kwargs.values())) if tensor.ndim}
    if len(devices) < 2 or all(device.type != "cpu" for device in devices):
        return None
    return next(device for device in devices if device.type != "cpu")


def _tensors(values: Any) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found
