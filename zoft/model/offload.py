"""Models that do not fit one device: placed by accelerate, their weights kept where they are for good.

accelerate's own offloading puts new parameters into a module for each of its forward passes. A block has to stay the
tensor that it is: it is recognised by identity where it is perturbed, and swept where it is stored. So what accelerate
would keep on disk is mapped into memory from a file, which the system reads and writes as there is room; what it would
keep in host memory stays there; and `zoft.weights.streamed` moves either to the device, perturbed or not, for the
function that reads it. Records and weights are those of a plain run.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device

from zoft.errors import ModelError
from zoft.weights.streamed import devices_of

DeviceMap = str | dict[str, str | int]

_FILES = "zoft-weights-"


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


def checked(device_map: DeviceMap, model: torch.nn.Module) -> DeviceMap:
    """Return ``device_map`` spelled out; `ModelError` unless it has one place for every weight of ``model``."""
    device_map = spelled_out(device_map)
    if isinstance(device_map, str):
        return device_map
    modules = dict(model.named_modules())
    if strange := [module for module in device_map if module not in modules]:
        inner = ", ".join(name for name in modules if name.count(".") < 2 and name)
        raise ModelError(f"device_map: this model has no module called {strange[0]!r}; there are {inner} ..")
    found: dict[torch.Tensor, tuple[str, Any]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = _place_of(name, device_map)
        if place is None:
            raise ModelError(f"device_map: {name} has no place; name its module, or '' for all that is not named")
        tied, other = found.setdefault(parameter, (name, place))
        if other != place:
            raise ModelError(
                f"device_map: {tied} is to be on {other} and {name}, which is the same tensor, on {place}; "
                "give both one place"
            )
    return device_map


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
    """What the longest prefix of ``name`` in a device map says; None where there is none."""
    found = [key for key in places if key in ("", name) or name.startswith(f"{key}.")]
    return places[max(found, key=len)] if found else None


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


def second_copy(model: torch.nn.Module) -> tuple[torch.device, DeviceMap | None]:
    """Return device and device map of another copy of ``model``: where it is, but never twice on one of its devices.

    Of a model on several devices it is in host memory, or on disk where a part of the model is there.
    """
    devices = devices_of(model)
    if any(map(in_file, model.parameters())):
        return torch.device("cpu"), {"": "disk"}
    return (devices[0] if len(devices) == 1 else torch.device("cpu")), None
