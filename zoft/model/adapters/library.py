"""Import and call `peft` without changing the user's random generators or printing its notices."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zoft.errors import ConfigError
from zoft.quiet import quiet_bitsandbytes
from zoft.weights.streamed import devices_of

NAME = "default"  # peft's name of a model's only adapter


def import_peft() -> Any:
    """Import and return the module `peft`; `ConfigError` if it is not installed."""
    try:
        with quiet_bitsandbytes():
            import peft
    except ImportError as error:
        raise ConfigError("LoRA and prefixes need the library peft: pip install 'zoft[peft]'") from error
    return peft


def task_type(model: Any) -> Any:
    """Return peft's task type of ``model``; None for a masked model, for which peft has none."""
    return None if type(model).__name__.endswith("ForMaskedLM") else import_peft().TaskType.CAUSAL_LM


def architecture_name(model: Any) -> str:
    """Return the name of the architecture of ``model``, for error messages."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def wrap(model: Any, config: Any) -> Any:
    """Return ``model``, frozen, wrapped by peft with a new adapter of ``config``; the caller initialises it."""
    with preserving_generators(model):
        return import_peft().get_peft_model(model.requires_grad_(False), config).eval()


def record_base(wrapped: Any, base: str, revision: str | None) -> None:
    """Write the base model's name and revision into the adapter's configuration."""
    config = wrapped.peft_config[NAME]
    config.base_model_name_or_path, config.revision = base, revision


@contextmanager
def preserving_generators(model: Any) -> Iterator[None]:
    """Restore the state of torch's generators, from which peft draws, and silence its FutureWarnings."""
    devices = [device for device in devices_of(model) if device.type == "cuda"]
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
