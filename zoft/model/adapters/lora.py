"""LoRA: find the modules to adapt, wrap them, and initialise A and B."""

import hashlib
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from zoft.errors import ModelError
from zoft.model.adapters.library import architecture_name, import_peft, task_type, wrap
from zoft.model.adapters.settings import LoRA

# Names of query and value projections by model family, then of modules that compute query, key and value at once.
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("query_proj", "value_proj"), ("q_lin", "v_lin"))
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "att_proj")


def with_lora(model: Any, adapter: LoRA, seed: int) -> Any:
    """Return ``model`` wrapped with ``adapter``: A drawn by ``seed``, B zero."""
    targets = default_targets(model) if adapter.targets is None else _check_targets(adapter.targets, model)
    adapted = [module for name, module in _linear_modules(model) if _matches(name, targets)]
    transposed = any(type(module).__name__ == "Conv1D" for module in adapted)
    config = import_peft().LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(targets),
        task_type=task_type(model),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
    )
    wrapped = wrap(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            _initialise_(name, parameter, seed)
    return wrapped


@torch.no_grad()
def _initialise_(name: str, parameter: torch.nn.Parameter, seed: int) -> None:
    """Set B to zero and A uniform on +-1 / sqrt(inputs), drawn by seed and name: peft's distribution, in any order."""
    if ".lora_A." not in name:
        parameter.zero_()
        return
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.Philox(key=[seed, key])).random(parameter.numel(), dtype=np.float32)
    bound = np.float32(1 / math.sqrt(parameter.shape[1]))
    parameter.copy_(torch.from_numpy((2 * drawn - 1) * bound).view(parameter.shape))


def default_targets(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the query and value projections of ``model``, or of the module that computes both.

    Raises:
        ModelError: no module has one of the known names.
    """
    names = _last_names(model)
    for pair in _QUERY_AND_VALUE:
        if names.issuperset(pair):
            return pair
    for fused in _FUSED:
        if fused in names:
            return (fused,)
    raise ModelError(
        f"zoft does not know the query and value projections of this {architecture_name(model)} model by name; give "
        f"the names of linear modules by --set lora.targets=NAME,NAME: it has {_listed(names)}"
    )


def _check_targets(targets: tuple[str, ...], model: torch.nn.Module) -> tuple[str, ...]:
    for target in targets:
        if not any(_matches(name, (target,)) for name, _ in _linear_modules(model)):
            raise ModelError(
                f"lora.targets: this {architecture_name(model)} model has no linear module called {target!r}; "
                f"there are {_listed(_last_names(model))}"
            )
        if other := next((n for n, m in model.named_modules() if _matches(n, (target,)) and not _is_linear(m)), None):
            raise ModelError(f"lora.targets: {target!r} is also {other}, which is not linear; name more of the path")
    return targets


def _matches(name: str, targets: Collection[str]) -> bool:
    """Return whether peft matches the module called ``name`` with one of ``targets``."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _linear_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if _is_linear(module)]


def _last_names(model: torch.nn.Module) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, _ in _linear_modules(model)}


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "no linear modules"
