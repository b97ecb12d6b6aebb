"""`peft` itself: that it is there, and that it leaves the user's generators and terminal alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from zoft.errors import ConfigError
from zoft.quiet import quiet_bitsandbytes
from zoft.weights.streamed import devices_of

NAME = "default"  # peft's own name of the one adapter of a model


def library() -> Any:
    """Return the module `peft`; `ConfigError` where it is not installed."""
    try:
        with quiet_bitsandbytes():
            import peft
    except ImportError as error:
        raise ConfigError("LoRA and prefixes need the library peft: pip install 'zoft[peft]'") from error
    return peft


def task_of(model: Any) -> Any:
    """Return what peft calls the task of ``model``; None for a masked model, for which it has no name."""
    return None if type(model).__name__.endswith("ForMaskedLM") else library().TaskType.CAUSAL_LM


def kind_of(model: Any) -> str:
    """Return the architecture of ``model`` as an error names it."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def wrap(model: Any, config: Any) -> Any:
    """Return ``model``, frozen, wrapped by peft with a new adapter of ``config``, which the caller gives its start."""
    with undisturbed(model):
        return library().get_peft_model(model.requires_grad_(False), config).eval()


def name_base(wrapped: Any, base: str, revision: str | None) -> None:
    """Write into the adapter's configuration which model it goes with."""
    config = wrapped.peft_config[NAME]
    config.base_model_name_or_path, config.revision = base, revision


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Give torch's generators their state back, which peft draws from, and keep notices of changes to come quiet."""
    devices = [device for device in devices_of(model) if device.type == "cuda"]
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
