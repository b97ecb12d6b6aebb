"""Load a language model, causal or masked, from the Hub, a folder or a GGUF file; save it in Hugging Face layout."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zoft import memory
from zoft.errors import ModelError
from zoft.files import replacing
from zoft.model import adapters, checkpoint
from zoft.model.adapters import Adapter
from zoft.model.architecture import context_length, is_masked
from zoft.model.config import read_config
from zoft.model.kernel_caches import bound_kernel_caches
from zoft.model.offload import DeviceMap, placement_of_copy
from zoft.model.pretrained import read_model, read_tokenizer, restore_vectors_
from zoft.model.sources import resolve
from zoft.weights import products
from zoft.weights.blocks import trainable_blocks
from zoft.weights.streamed import streaming
from zoft.weights.vectors import install_fp32_vectors

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, its tokenizer, and where both came from.

    ``source`` is the model as the user named it, ``path`` the local folder with config and weights (a snapshot of
    the Hub cache, the folder itself, or the converted GGUF), ``stored_dtype`` the checkpoint's own dtype. With an
    adapter, ``model`` is wrapped by `peft`, ``path`` is the folder of its base, ``base`` is the base's name, and
    ``start`` holds the adapter's weights as they were loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    path: Path
    stored_dtype: torch.dtype
    revision: str | None = None
    base: str = ""
    start: dict[str, torch.Tensor] | None = None

    @property
    def context_length(self) -> int:
        """Number of tokens that model and tokenizer both allow; ``sys.maxsize`` if neither has a limit."""
        return context_length(self.model, self.tokenizer)

    @property
    def masked(self) -> bool:
        """Whether the model is a masked language model."""
        return is_masked(self.model)


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
    bound_kernels: bool = False,
) -> Loaded:
    """Load ``model`` in evaluation mode, tied weights tied, without running code that comes with it.

    ``dtype="auto"`` is the checkpoint's own; ``device="auto"`` is CUDA if available. With ``fp32_vectors`` the
    one-dimensional parameters of a half-precision model are stored and computed in float32, with the checkpoint's
    values. A given ``tokenizer`` is used instead of the one beside the weights (reading one takes tens of megabytes).
    A ``device_map`` spreads a model that does not fit one device, as accelerate does ("auto", or devices by module: a
    GPU, "cpu", "disk"; `zoft.model.offload.parse_device_map`); run it inside `zoft.weights.streamed.streaming`.
    Raises `ModelError` if anything is missing or cannot be loaded.

    With an ``adapter`` the model is frozen and wrapped with a new one, whose initial weights are a function of base and
    ``seed``; if ``model`` names an adapter itself, it is read together with its base. Only the adapter is trainable
    then, in float32; vectors of the base stay in its dtype.

    With ``bound_kernels``, for jobs that have the process to themselves, `bound_kernel_caches` sets environment
    variables before the first forward pass.

    >>> loaded = load("HuggingFaceTB/SmolLM2-135M", dtype="bf16")  # doctest: +SKIP
    """
    target = choose_device(device)
    if device_map is not None and device != "auto":
        raise ModelError(f"device {device} and a device_map: give only one of the two")
    found = resolve(model, revision=revision)
    config = read_config(found.path)
    stored = checkpoint.stored_dtype(found.path)
    loaded = Loaded(
        model=read_model(found.path, config, _choose_dtype(dtype, stored), target, device_map),
        tokenizer=tokenizer or read_tokenizer(found.path),
        source=str(model),
        path=found.path,
        stored_dtype=stored,
        revision=found.revision,
        base=str(model),
    )
    if bound_kernels:
        bound_kernel_caches(loaded.model)
    products.install(loaded.model)
    if adapter is not None or found.adapter is not None:
        return _adapted(loaded, found.adapter, adapter, seed)
    if fp32_vectors:
        install_fp32_vectors(loaded.model)
        restore_vectors_(loaded.model, found.path)
    return loaded


def _adapted(loaded: Loaded, folder: Path | None, adapter: Adapter | None, seed: int) -> Loaded:
    """Return ``loaded`` wrapped with the adapter in ``folder``, or with a new one."""
    if folder is not None:
        if adapter is not None:
            raise ModelError(
                f"{folder} is an adapter already; it is trained with its own settings: leave out --{adapter.mode}"
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
    """Write ``model`` to a new ``folder`` in Hugging Face layout, atomically; ``card`` is the text of its README.md.

    Weights are stored once each as safetensors in ``dtype``; casting needs no memory of the model's size. If the model
    has an adapter, only the adapter is written, as `peft` does, in float32.
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
    """Reset the parameters of ``loaded.model`` to the values of its checkpoint, in place.

    They are read from disk again, so the weights are in memory twice while this runs and only then. Memory that the
    caller has freed (an optimizer's moments, say) is returned to the system before, and the second copy after. An
    adapter is reset to ``loaded.start``; its base never changed.
    """
    memory.release()
    model = loaded.model
    if loaded.start is not None:
        for block in trainable_blocks(model):
            block.parameter.copy_(loaded.start[block.name])
        return
    fresh = read_model(loaded.path, read_config(loaded.path), model.dtype, *placement_of_copy(model))
    for parameter, value in zip(model.parameters(), fresh.parameters(), strict=True):
        parameter.copy_(value)
    del fresh, value
    memory.release()


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA if available, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"no device {name!r} here ({reason}); try --device auto, cpu or cuda") from error
    return device


def _choose_dtype(name: str, stored: torch.dtype) -> torch.dtype:
    if name == "auto":
        return stored
    if name not in DTYPES:
        raise ModelError(f"no dtype {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]
