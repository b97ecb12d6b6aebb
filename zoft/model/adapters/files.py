"""Adapters on disk, as `peft` saves them: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from zoft.errors import ModelError
from zoft.model.adapters.library import library, name_base, undisturbed
from zoft.model.adapters.prefix import prefixed

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the base model that the adapter in ``folder`` names, and its revision on the Hub, where it has one."""
    said = _read_config(folder)
    base, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / CONFIG_FILE} names no base model (base_model_name_or_path); write it there")
    return base, revision if isinstance(revision, str) else None


def read(model: Any, folder: Path) -> Any:
    """Return ``model``, frozen, wrapped by peft with the adapter in ``folder``, which is trainable.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the adapter is of another kind, has no safetensors weights, or does not fit the model.
    """
    kind = _read_config(folder).get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise ModelError(f"{folder} is an adapter of the kind {kind!r}; zoft knows LORA and PREFIX_TUNING")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}; zoft opens no pickle: save the adapter as safetensors")
    try:
        return (_read_lora if kind == "LORA" else _read_prefix)(model, folder)
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, SafetensorError, UserWarning) as error:
        raise ModelError(f"{folder} does not fit its base model: {' '.join(str(error).split())}") from error


def _read_lora(model: Any, folder: Path) -> Any:
    device = "cpu" if model.device.type == "meta" else str(model.device)
    with undisturbed(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*meta parameter")
        wrapped = library().PeftModel.from_pretrained(model, folder, is_trainable=True, torch_device=device)
    return wrapped.eval()  # no dropout: an objective has to be deterministic


def _read_prefix(model: Any, folder: Path) -> Any:
    config = library().PrefixTuningConfig.from_pretrained(folder)
    base, revision = config.base_model_name_or_path, config.revision
    config.inference_mode, config.prefix_projection = False, False  # what is saved is what the projection gave
    matrix = load_file(folder / WEIGHTS_FILE)["prompt_embeddings"]
    expected = [config.num_virtual_tokens, config.num_layers * 2 * config.token_dim]
    if list(matrix.shape) != expected:
        raise ValueError(f"prompt_embeddings is {list(matrix.shape)}, expected {expected}")
    wrapped = prefixed(model, config, matrix)
    name_base(wrapped, base, revision)
    return wrapped


def save(model: Any, folder: Path) -> None:
    """Write the adapter of ``model`` to the existing ``folder`` as peft does: configuration, weights, README."""
    model.save_pretrained(folder, save_embedding_layers=False)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is not a JSON object ({error}); fetch it again") from error
