"""Read a model folder's configuration, check that zoft can train the model, and build it without weights."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

from zoft.errors import ModelError
from zoft.quiet import quiet_transformers


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of the language model in ``folder``; `ModelError` if it is of another kind of model."""
    raw = _raw_config(folder)
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        needs = "needs its own code (auto_map), which zoft does not run" if "auto_map" in raw else "is unknown"
        raise ModelError(
            f"{folder}: the architecture {kind!r} {needs}; this transformers supports {len(CONFIG_MAPPING)} others"
        )
    if "quantization_config" in raw:
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise ModelError(
            f"{folder}: the weights are quantised ({method}); take the unquantised checkpoint of this model"
        )
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise ModelError(f"{folder / 'config.json'} is not a valid {kind} configuration: {error}") from error
    if not (is_masked_config(config) or _is_causal(config)):
        raise ModelError(
            f"{folder} is a {kind} model ({_classes(raw)}); expected a causal language model, or a masked one "
            "(architectures in config.json: a name that ends in ForMaskedLM)"
        )
    return config


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of ``config`` with shapes and ties but no weights (on the meta device)."""
    with quiet_transformers(), torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=False)


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a model of ``config``."""
    return AutoModelForMaskedLM if is_masked_config(config) else AutoModelForCausalLM


def is_masked_config(config: PretrainedConfig) -> bool:
    """Whether ``config`` is of a masked language model."""
    named = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    return named and type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _raw_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no config.json; expected a model folder in Hugging Face layout") from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not a JSON object ({error}); download it again") from error


def _is_causal(config: PretrainedConfig) -> bool:
    """Return whether ``config`` is of a causal model; BERT and its like have a causal class, too, if ``is_decoder``."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        return False
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or bool(getattr(config, "is_decoder", False))


def _classes(raw: dict[str, Any]) -> str:
    return ", ".join(raw.get("architectures") or ["no class named"])
