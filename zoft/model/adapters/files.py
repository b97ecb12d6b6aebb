"""Read and save adapters in the format of `peft`: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from zoft.errors import ModelError
from zoft.model.adapters.library import import_peft, preserving_generators, record_base
from zoft.model.adapters.prefix import wrap_with_prefix

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Return whether ``folder`` contains an adapter and not a model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the name of the base model of the adapter in ``folder``, and its Hub revision or None."""
    config = _read_config(folder)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder / CONFIG_FILE} has no base_model_name_or_path; add the name of its base model")
    return base, revision if isinstance(revision, str) else None


def read(model: Any, folder: Path) -> Any:
    """Return ``model``, frozen, wrapped by peft with the trainable adapter in ``folder``.

    Raises:
        ConfigError: peft is not installed.
        ModelError: the adapter is of another type, has no safetensors weights, or does not fit the model.
    """
    kind = _read_config(folder).get("peft_type")
    if kind not in ("LORA", "PREFIX_TUNING"):
        raise ModelError(f"{folder} is an adapter of the type {kind!r}; zoft supports LORA and PREFIX_TUNING")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}; zoft does not open pickles: save the adapter as safetensors")
    try:
        return (_read_lora if kind == "LORA" else _read_prefix)(model, folder)
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, SafetensorError, UserWarning) as error:
        raise ModelError(f"{folder} does not fit its base model: {' '.join(str(error).split())}") from error


def _read_lora(model: Any, folder: Path) -> Any:
    device = "cpu" if model.device.type == "meta" else str(model.device)
    with preserving_generators(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*meta parameter")
        wrapped = import_peft().PeftModel.from_pretrained(model, folder, is_trainable=True, torch_device=device)
    return wrapped.eval()  # no dropout: an objective has to be deterministic


def _read_prefix(model: Any, folder: Path) -> Any:
    config = import_peft().PrefixTuningConfig.from_pretrained(folder)
    base, revision = config.base_model_name_or_path, config.revision
    config.inference_mode, config.prefix_projection = False, False  # the saved matrix is the output of the projection
    matrix = load_file(folder / WEIGHTS_FILE)["prompt_embeddings"]
    expected = [config.num_virtual_tokens, config.num_layers * 2 * config.token_dim]
    if list(matrix.shape) != expected:
        raise ValueError(f"prompt_embeddings is {list(matrix.shape)}, expected {expected}")
    wrapped = wrap_with_prefix(model, config, matrix)
    record_base(wrapped, base, revision)
    return wrapped


def save(model: Any, folder: Path) -> None:
    """Write the adapter of ``model`` to the existing ``folder`` in peft's layout: configuration, weights, README."""
    model.save_pretrained(folder, save_embedding_layers=False)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} is not a JSON object ({error}); download it again") from error
