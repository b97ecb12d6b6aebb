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
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LOOKUPS = {functional.embedding, torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select}
_MOVES = {torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.__setitem__, torch.Tensor.type_as}


@torch.no_grad()
def settle(model: torch.nn.Module) -> None:
    """Give the weights of ``model``, as accelerate has dispatched it, their places for good.

    accelerate's hooks, which wrap ``forward``, give way to torch's: modules on a device get their inputs there, and
    those in host memory or on disk hand their outputs to the device that they serve.
    """
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
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
    with tempfile.NamedTemporaryFile(prefix="zoft-weights-") as file:
        file.truncate(tensor.nbytes)
        out = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return out.view(tensor.shape).copy_(tensor)


def streaming(model: torch.nn.Module) -> AbstractContextManager[Any]:
    """Return the context that ``model`` has to run in: it moves weights where they are not where they are used."""
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    accelerated = bool(places - {"cpu", "disk"})
    hosted = any(parameter.device.type == "cpu" for parameter in model.parameters())
    return StreamedWeights() if accelerated and hosted else nullcontext()


class StreamedWeights(TorchFunctionMode):
    """Inside this context a function that reads tensors in host memory beside others gets copies of them on the device.

    A lookup goes the other way: its indices come to the table. Enter it before `zoft.perturb.PerturbedWeights`, which
    then makes its perturbed weights in host memory, to be moved from there.
    """

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
        return func(*_moved(args, device), **{key: _move(value, device) for key, value in kwargs.items()})


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


def _moved(values: Any, device: torch.device) -> list[Any]:
    return [_move(value, device) for value in values]


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return type(value)(_moved(value, device)) if isinstance(value, (tuple, list)) else value
