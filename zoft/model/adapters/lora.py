"""LoRA: which modules it goes to, and where it starts."""

import hashlib
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from zoft.errors import ModelError
from zoft.model.adapters.library import kind_of, library, task_of, wrap
from zoft.model.adapters.settings import LoRA

# Query and value projections as the families call them, then those that compute query, key and value in one.
_QUERY_AND_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("query_proj", "value_proj"), ("q_lin", "v_lin"))
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "att_proj")


def with_lora(model: Any, adapter: LoRA, seed: int) -> Any:
    """Return ``model`` wrapped with ``adapter``: A drawn by ``seed``, B zero."""
    targets = default_targets(model) if adapter.targets is None else _checked(adapter.targets, model)
    transposed = any(type(module).__name__ == "Conv1D" for name, module in _linear(model) if _is(name, targets))
    config = library().LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(targets),
        task_type=task_of(model),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
    )
    wrapped = wrap(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            _start_(name, parameter, seed)
    return wrapped


@torch.no_grad()
def _start_(name: str, parameter: torch.nn.Parameter, seed: int) -> None:
    """B zero; A uniform on +-1 / sqrt(inputs), drawn by seed and name: peft's distribution, whatever the order."""
    if ".lora_A." not in name:
        parameter.zero_()
        return
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.Philox(key=[seed, key])).random(parameter.numel(), dtype=np.float32)
    bound = np.float32(1 / math.sqrt(parameter.shape[1]))
    parameter.copy_(torch.from_numpy((2 * drawn - 1) * bound).view(parameter.shape))


def default_targets(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the query and value projections of ``model``, or of what computes them in one.

    Raises:
        ModelError: none has a name that is known for it.
    """
    names = _last_names(model)
    for pair in _QUERY_AND_VALUE:
        if names.issuperset(pair):
            return pair
    for fused in _FUSED:
        if fused in names:
            return (fused,)
    raise ModelError(
        f"the query and value projections of this {kind_of(model)} model have no name that zoft knows; name linear "
        f"modules by --set lora.targets=NAME,NAME: there are {_listed(names)}"
    )


def _checked(targets: tuple[str, ...], model: torch.nn.Module) -> tuple[str, ...]:
    for target in targets:
        if not any(_is(name, (target,)) for name, _ in _linear(model)):
            raise ModelError(
                f"lora.targets: this {kind_of(model)} model has no linear module called {target!r}; there are "
                f"{_listed(_last_names(model))}"
            )
        if other := next((n for n, m in model.named_modules() if _is(n, (target,)) and not _is_linear(m)), None):
            raise ModelError(f"lora.targets: {target!r} is also {other}, which is not linear; name more of the path")
    return targets


def _is(name: str, targets: Collection[str]) -> bool:
    """Whether peft takes the module called ``name`` for one of ``targets``."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _linear(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if _is_linear(module)]


def _last_names(model: torch.nn.Module) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, _ in _linear(model)}


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "no linear modules"
