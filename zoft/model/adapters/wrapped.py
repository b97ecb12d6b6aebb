"""Wrap a model with an adapter, and read the adapter's settings back from a wrapped model."""

from collections.abc import Collection
from typing import Any

import torch

from zoft.errors import ModelError
from zoft.model.adapters.library import record_base
from zoft.model.adapters.lora import with_lora
from zoft.model.adapters.prefix import with_prefix
from zoft.model.adapters.settings import Adapter, LoRA, Prefix
from zoft.weights.blocks import Mode


def attach(
    model: Any,
    adapter: Adapter,
    *,
    seed: int,
    special: Collection[int] = (),
    base: str = "",
    revision: str | None = None,
) -> Any:
    """Return ``model``, frozen, wrapped by peft with a new ``adapter``, initialised by model and ``seed``.

    Args:
        model: a transformers model; changed in place.
        adapter: its settings.
        seed: draws A of LoRA, or the tokens whose activations a prefix starts from.
        special: token ids that are not text.
        base, revision: name of the model in the adapter's configuration.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the model has no such modules, or does not support a prefix.

    >>> wrapped = attach(model, LoRA(rank=4), seed=0)  # doctest: +SKIP
    """
    if isinstance(adapter, LoRA):
        wrapped = with_lora(model, adapter, seed)
    else:
        wrapped = with_prefix(model, adapter, seed, special)
    record_base(wrapped, base, revision)
    return wrapped


def adapter_of(model: torch.nn.Module) -> Adapter | None:
    """Return the settings of the adapter that peft has wrapped ``model`` with; None if there is none.

    `ModelError` if it is of a type that zoft does not train.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    if len(configs) != 1:
        raise ModelError(f"the model has {len(configs)} adapters ({', '.join(configs)}); zoft trains one")
    (config,) = configs.values()
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "PREFIX_TUNING":
        return Prefix(tokens=config.num_virtual_tokens)
    if kind == "LORA":
        targets = config.target_modules
        return LoRA(rank=config.r, alpha=config.lora_alpha, targets=targets if isinstance(targets, str) else [*targets])
    raise ModelError(f"the model has an adapter of the type {kind}; zoft supports LORA and PREFIX_TUNING")


def mode_of(model: torch.nn.Module) -> Mode:
    """Return which weights of ``model`` are trained: all, LoRA, or prefixes."""
    adapter = adapter_of(model)
    return "full" if adapter is None else adapter.mode


def virtual_tokens(model: torch.nn.Module) -> int:
    """Return the number of positions that a prefix takes from the context of ``model``."""
    adapter = adapter_of(model)
    return adapter.tokens if isinstance(adapter, Prefix) else 0
