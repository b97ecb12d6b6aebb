"""Load a language model, causal or masked, from the Hub, a folder or a GGUF file; save it in Hugging Face layout."""

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zoft import memory
from zoft.errors import ModelError
from zoft.files import replacing
from zoft.model import adapters, checkpoint
from zoft.model.adapters import Adapter
from zoft.model.offload import DeviceMap, checked, second_copy, settle
from zoft.model.sources import resolve
from zoft.quiet import quiet_transformers
from zoft.weights import products
from zoft.weights.blocks import trainable_blocks
from zoft.weights.streamed import streaming
from zoft.weights.vectors import install_fp32_vectors

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run and what is known of where it came from.

    ``source`` is the model as the user named it, ``path`` the local folder with config and weights (a snapshot of
    the Hub cache, the folder itself, or the converted GGUF), ``stored_dtype`` the checkpoint's own dtype. With an
    adapter, ``model`` is wrapped by `peft`, ``path`` is the folder of its base, ``base`` names that, and ``start`` are
    the adapter's weights as they were loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    path: Path
    stored_dtype: torch.dtype
    revision: str | None = None
    base: str = ""
    start: dict[str, torch.Tensor] | None = None


def load(
    model: str | Path,
    *,
    dtype: DtypeName = "auto",
    device: str = "auto",
    fp32_vectors: bool = False,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device_map: DeviceMap | None = None,
    adapter: Adapter | None = None,
    seed: int = 0,
) -> Loaded:
    """Load ``model`` in evaluation mode, tied weights tied, without running code that comes with it.

    ``dtype="auto"`` is the checkpoint's own; ``device="auto"`` is CUDA where there is one. With ``fp32_vectors``
    the one-dimensional parameters of a half-precision model live and compute in float32, with the checkpoint's
    values. A ``tokenizer`` that was read before is taken instead of the one beside the weights (reading one takes tens
    of megabytes). A ``device_map`` spreads a model that fits no single device, as accelerate does ("auto", or devices
    by module: a GPU, "cpu", "disk"; `zoft.model.offload.spelled_out`); run it in the context of `streaming`.
    Raises `ModelError` for everything that cannot be loaded whole.

    With an ``adapter`` the model is frozen and wrapped with a new one, whose start is a function of base and ``seed``;
    where ``model`` is an adapter itself, that is read, and its base below it. Only the adapter is trainable then, in
    float32; vectors of the base stay in its dtype.

    >>> loaded = load("HuggingFaceTB/SmolLM2-135M", dtype="bf16")  # doctest: +SKIP
    """
    target = choose_device(device)
    if device_map is not None and device != "auto":
        raise ModelError(f"device {device} and a device_map: name one of the two")
    found = resolve(model, revision=revision)
    config = read_config(found.path)
    stored = checkpoint.stored_dtype(found.path)
    loaded = Loaded(
        model=_read_model(found.path, config, _choose_dtype(dtype, stored), target, device_map),
        tokenizer=tokenizer or _read_tokenizer(found.path),
        source=str(model),
        path=found.path,
        stored_dtype=stored,
        revision=found.revision,
        base=str(model),
    )
    memory.bound_kernel_caches(loaded.model)
    products.install(loaded.model)
    if adapter is not None or found.adapter is not None:
        return _adapted(loaded, found.adapter, adapter, seed)
    if fp32_vectors:
        install_fp32_vectors(loaded.model)
        _restore_vectors(loaded.model, found.path)
    return loaded


def _adapted(loaded: Loaded, folder: Path | None, adapter: Adapter | None, seed: int) -> Loaded:
    """``loaded`` in the adapter that ``folder`` holds, or in a new one."""
    if folder is not None:
        if adapter is not None:
            raise ModelError(
                f"{folder} is an adapter already, and is trained further as it is: leave out --{adapter.mode}"
            )
        wrapped, base = adapters.read(loaded.model, folder), adapters.base_of(folder)[0]
    else:
        assert adapter is not None
        base = loaded.source
        lasting = base.partition("@")[0] if loaded.revision else str(Path(base).expanduser().absolute())
        special = loaded.tokenizer.all_special_ids
        with streaming(loaded.model):  # a prefix starts from a forward pass
            wrapped = adapters.attach(
                loaded.model, adapter, seed=seed, special=special, base=lasting, revision=loaded.revision
            )
    start = {block.name: block.parameter.detach().clone() for block in trainable_blocks(wrapped)}
    return replace(loaded, model=wrapped, base=base, start=start)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype, card: str
) -> None:
    """Write ``model`` to a new ``folder`` in Hugging Face layout, whole or not at all; ``card`` is its README.md.

    Weights are stored once each as safetensors in ``dtype``; casting needs no memory of the model's size. Of a model in
    an adapter, the adapter alone is written, as `peft` does, in float32.
    """
    with replacing(folder) as temporary:
        temporary.mkdir()
        if adapters.adapter_of(model) is not None:
            adapters.save(model, temporary)
        else:
            checkpoint.write(model, tokenizer, temporary, dtype=dtype)
        (temporary / "README.md").write_text(card, encoding="utf-8")


@torch.no_grad()
def restore_(loaded: Loaded) -> None:
    """Give the parameters of ``loaded.model`` the values of its checkpoint again, in place.

    They are read from disk anew: for that moment the weights are there twice, and never between. What the caller has
    freed before, moments of an optimizer for one, goes back to the system first, and the second copy afterwards. An
    adapter returns to its start, and its base was never moved.
    """
    memory.release()
    model = loaded.model
    if loaded.start is not None:
        for block in trainable_blocks(model):
            block.parameter.copy_(loaded.start[block.name])
        return
    fresh = _read_model(loaded.path, read_config(loaded.path), model.dtype, *second_copy(model))
    for parameter, value in zip(model.parameters(), fresh.parameters(), strict=True):
        parameter.copy_(value)
    del fresh, value
    memory.release()


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that model and tokenizer both allow; ``sys.maxsize`` where neither has a limit."""
    text = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limits = [getattr(text, name, None) for name in names]
    taken = position_start(model) + adapters.virtual_tokens(model)
    positions = [int(limit) - taken for limit in limits if limit]
    return min([*positions, tokenizer.model_max_length or sys.maxsize, sys.maxsize])


def is_masked(model: torch.nn.Module | PretrainedConfig) -> bool:
    """Whether this is a masked language model, or the configuration of one: it reads both ways and fills gaps."""
    if isinstance(model, PretrainedConfig):
        named = any(name.endswith("ForMaskedLM") for name in model.architectures or ())
        return named and type(model) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model, "is_decoder", False)
    return type(unwrapped(model)).__name__.endswith("ForMaskedLM")


def position_start(model: torch.nn.Module) -> int:
    """Return the position of a row's first token: 0, but ``padding_idx + 1`` in the RoBERTa family."""
    embeddings = getattr(getattr(unwrapped(model), "base_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model of transformers inside ``model``; PEFT's classes hide what it is and takes."""
    return getattr(model, "get_base_model", lambda: model)()


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"no device {name!r} here ({reason}); try --device auto, cpu or cuda") from error
    return device


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of the language model in ``folder``; `ModelError` if it holds another thing."""
    raw = _raw_config(folder)
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        needs = "needs code of its own (auto_map), which zoft does not run" if "auto_map" in raw else "is unknown"
        raise ModelError(
            f"{folder}: the architecture {kind!r} {needs}; this transformers knows {len(CONFIG_MAPPING)} others"
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
            raise ModelError(f"{folder / 'config.json'} is no valid {kind} configuration: {error}") from error
    if not (is_masked(config) or _is_causal(config)):
        raise ModelError(
            f"{folder} is a {kind} model ({_classes(raw)}); expected a causal language model, or a masked one "
            "(architectures in config.json: a name that ends in ForMaskedLM)"
        )
    return config


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of ``config`` with shapes and ties but no weights (on the meta device)."""
    with quiet_transformers(), torch.device("meta"):
        return _auto_class(config).from_config(config, trust_remote_code=False)


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM


def _raw_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no config.json; expected a model folder in Hugging Face layout") from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not a JSON object ({error}); fetch it again") from error


def _is_causal(config: PretrainedConfig) -> bool:
    """Encoders such as BERT have a causal class too; without ``is_decoder`` they look both ways."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        return False
    return type(config) not in MODEL_FOR_MASKED_LM_MAPPING or bool(getattr(config, "is_decoder", False))


def _classes(raw: dict[str, Any]) -> str:
    return ", ".join(raw.get("architectures") or ["no class named"])


def _choose_dtype(name: str, stored: torch.dtype) -> torch.dtype:
    if name == "auto":
        return stored
    if name not in DTYPES:
        raise ModelError(f"no dtype {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _read_model(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    device_map: DeviceMap | None = None,
) -> PreTrainedModel:
    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    with quiet_transformers(), tempfile.TemporaryDirectory() as offload_folder:
        if device_map is not None:
            placement = {"device_map": checked(device_map, meta_model(config)), "offload_folder": offload_folder}
        try:
            model, info = _auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **placement,
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{folder} does not fit on {device}; try --dtype bf16, another device or --set device_map=auto"
            ) from error
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder} cannot be loaded: {str(error).strip() or type(error).__name__}") from error
        _check_complete(folder, info)
        settle(model)
    return model.eval()


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """A weight that the checkpoint lacks would start at random: refuse instead."""
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info[problem])
        if names:
            what = "are absent from" if problem == "missing_keys" else "have another shape in"
            raise ModelError(
                f"{folder}: {len(names)} of the weights that config.json asks for {what} the checkpoint "
                f"(first: {names[0]}); the two do not belong together"
            )


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} holds no tokenizer (tokenizer.json or its kin); copy it from the base model")
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
            raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error


def _restore_vectors(model: PreTrainedModel, folder: Path) -> None:
    """Give float32 vectors the checkpoint's values where loading in half precision has rounded them."""
    prefix = model.base_model_prefix + "."
    vectors = {
        name.removeprefix(prefix): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 and parameter.dtype == torch.float32
    }
    for tensor in checkpoint.stored_tensors(folder):
        name = tensor.name.removeprefix(prefix)
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            name = name.replace(old, new)  # BERT's published files have the names of its first code
        vector = vectors.get(name)
        if vector is not None and vector.shape == tensor.shape:
            with safe_open(tensor.file, framework="pt") as file:
                vector.data.copy_(file.get_tensor(tensor.name))
