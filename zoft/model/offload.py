"""Load models that do not fit one device: accelerate decides the placement, and every weight keeps its place.

accelerate's own offloading puts new parameters into a module for each forward pass. zoft needs a block to stay the same
tensor: it is recognised by identity where it is perturbed, and updated where it is stored. So weights that accelerate
would keep on disk are memory-mapped from a file, which the system pages in and out; weights that it would keep in host
memory stay there; and `zoft.weights.streamed` copies either to the device, perturbed or not, for the function that
reads it. Records and weights are the same as in a run on one device.
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


def parse_device_map(device_map: DeviceMap) -> DeviceMap:
    """Return ``device_map`` in accelerate's form; a string may be ``auto``, ``disk`` or a list of ``module=device``.

    >>> parse_device_map("model=0, lm_head=disk")
    {'model': 0, 'lm_head': 'disk'}
    >>> parse_device_map("disk"), parse_device_map("auto")
    ({'': 'disk'}, 'auto')
    """
    if isinstance(device_map, str):
        if "=" not in device_map:
            return {"": "disk"} if device_map == "disk" else device_map
        pairs = (part.rpartition("=") for part in device_map.split(","))
        device_map = {module.strip(): device.strip() for module, _, device in pairs}
    return {module: int(device) if str(device).isdecimal() else device for module, device in device_map.items()}


def check_device_map(device_map: DeviceMap, model: torch.nn.Module) -> DeviceMap:
    """Return the parsed ``device_map``; raise `ModelError` unless it has one place for every weight of ``model``."""
    device_map = parse_device_map(device_map)
    if isinstance(device_map, str):
        return device_map
    modules = dict(model.named_modules())
    if strange := [module for module in device_map if module not in modules]:
        inner = ", ".join(name for name in modules if name.count(".") < 2 and name)
        raise ModelError(f"device_map: this model has no module called {strange[0]!r}; its modules are {inner} ..")
    found: dict[torch.Tensor, tuple[str, Any]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = _place_of(name, device_map)
        if place is None:
            raise ModelError(f"device_map: {name} has no place; name its module, or '' for all other modules")
        tied, other = found.setdefault(parameter, (name, place))
        if other != place:
            raise ModelError(
                f"device_map: {tied} is to be on {other} and {name}, which is the same tensor, on {place}; "
                "give both one place"
            )
    return device_map


@torch.no_grad()
def fix_placement(model: torch.nn.Module) -> None:
    """Replace accelerate's hooks in a dispatched ``model`` by fixed placements of its weights.

    accelerate's hooks wrap ``forward``; torch's hooks take their place: the inputs of modules on a device are moved
    there, and the outputs of modules in host memory or on disk are moved to the device that reads them.
    """
    places: dict[str, Any] = model.__dict__.pop("hf_device_map", {})  # peft would dispatch the model again by it
    hooked = [(name, module, module._hf_hook) for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    for name, module, hook in hooked:
        device, offloaded = hook.execution_device, hook.offload
        values = {key: hook.weights_map[key] for key in dict(module.named_parameters(recurse=False)) if offloaded}
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)  # left by the removal; it would hide a class set later
        for key, value in values.items():
            on_disk = _place_of(name, places) == "disk"
            module._parameters[key] = torch.nn.Parameter(memory_mapped(value) if on_disk else value)
        if not offloaded:
            module.register_forward_pre_hook(_inputs_to(device), with_kwargs=True)
        elif values:
            module.register_forward_hook(_output_to(device))
    if hooked:
        model.tie_weights()  # type: ignore[operator]


def _place_of(name: str, places: dict[str, Any]) -> Any:
    """Return the place of the longest prefix of ``name`` in a device map, or None."""
    found = [key for key in places if key in ("", name) or name.startswith(f"{key}.")]
    return places[max(found, key=len)] if found else None


def _inputs_to(device: Any) -> Callable[..., Any]:
    return lambda module, inputs, keywords: (send_to_device(inputs, device), send_to_device(keywords, device))


def _output_to(device: Any) -> Callable[..., Any]:
    return lambda module, inputs, output: send_to_device(output, device)


def memory_mapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``tensor`` in a memory-mapped file, writable, which is deleted when the process ends.

    The file is in the folder for temporary files (TMPDIR).

    >>> memory_mapped(torch.tensor([[1.0, 2.0]])).mul_(2)
    tensor([[2., 4.]])
    """
    return _zeros_in_file(tensor).copy_(tensor)


def is_memory_mapped(tensor: torch.Tensor) -> bool:
    """Return whether `memory_mapped` made ``tensor``."""
    return Path(tensor.untyped_storage().filename or "").name.startswith(_FILES)


def zeros_placed_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return zeros like ``tensor`` in the same kind of place: its device, host memory, or a memory-mapped file."""
    return _zeros_in_file(tensor) if is_memory_mapped(tensor) else torch.zeros_like(tensor)


def _zeros_in_file(tensor: torch.Tensor) -> torch.Tensor:
    with tempfile.NamedTemporaryFile(prefix=_FILES) as file:
        file.truncate(tensor.nbytes)
        out = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return out.view(tensor.shape)


def placement_of_copy(model: torch.nn.Module) -> tuple[torch.device, DeviceMap | None]:
    """Return the device and device map for loading a second copy of ``model``.

    The copy goes to the model's device. If the model is spread over several, the copy goes to host memory, or to disk
    if a part of the model is on disk.
    """
    devices = devices_of(model)
    if any(map(is_memory_mapped, model.parameters())):
        return torch.device("cpu"), {"": "disk"}
    return (devices[0] if len(devices) == 1 else torch.device("cpu")), None
