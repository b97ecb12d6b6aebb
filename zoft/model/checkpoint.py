"""Read and write the weights of a Hugging Face folder chunk by chunk, in little memory."""

import copy
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from zoft.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_SIZE = "5GB"
CHUNK = 1 << 20  # weights in flight while a tensor is written or read

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: its name, safetensors dtype (``"BF16"``), shape and place in a file (bytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the weights of ``folder``, in the order of their names.

    `ModelError` if there are none, if a file named by the index is missing, or if a file is truncated.
    """
    if (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    elif (folder / INDEX_FILE).is_file():
        files = [folder / name for name in sorted(set(_weight_map(folder / INDEX_FILE).values()))]
    else:
        raise ModelError(_no_weights(folder))
    for file in files:
        _check(file)
    return files


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Return every tensor stored in ``folder``, sorted by name, without reading any weight."""
    tensors = [tensor for file in weight_files(folder) for tensor in file_tensors(file)]
    return sorted(tensors, key=lambda tensor: tensor.name)


def file_tensors(file: Path) -> list[StoredTensor]:
    """Return every tensor of one safetensors file that `safe_open` accepts, without reading any weight."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return [
        StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + start, end - start)
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    ]


def read_into(stored: StoredTensor, target: torch.Tensor) -> None:
    """Read ``stored`` into the contiguous ``target`` of the same dtype and shape, chunk by chunk.

    `safe_open` would memory-map the file, which then counts beside ``target``.
    """
    if (_CODES.get(target.dtype), tuple(target.shape)) != (stored.dtype, stored.shape):
        raise ModelError(
            f"{stored.file}: {stored.name} is {stored.dtype} {list(stored.shape)}, "
            f"expected {target.dtype} {list(target.shape)}"
        )
    with stored.file.open("rb") as handle:
        handle.seek(stored.offset)
        for piece in target.detach().view(-1).split(CHUNK):
            data = bytearray(piece.numel() * piece.itemsize)
            if handle.readinto(data) != len(data):
                raise ModelError(f"{stored.file} ends within {stored.name}; the file is truncated")
            if data:
                piece.copy_(torch.frombuffer(data, dtype=piece.dtype))


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the floating dtype that most weights of ``folder`` are stored in.

    `ModelError` unless that is float32, bfloat16 or float16: other weights are packed or quantised.
    """
    bytes_by_code: dict[str, int] = {}
    for tensor in stored_tensors(folder):
        bytes_by_code[tensor.dtype] = bytes_by_code.get(tensor.dtype, 0) + tensor.length
    code = max(bytes_by_code, key=lambda code: bytes_by_code[code], default="none")
    if code not in ("F32", "BF16", "F16"):
        raise ModelError(
            f"{folder}: the weights are stored as {code}, expected F32, BF16 or F16; "
            "take the unquantised checkpoint of this model"
        )
    return DTYPES[code]


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype) -> None:
    """Write configuration, tokenizer and weights (in ``dtype``) of ``model`` to an existing ``folder``."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        # save_pretrained refuses settings that many published checkpoints contain.
        model.generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    write_weights(folder, revert_weight_conversion(model, _untied(model)), dtype)


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write ``tensors`` to ``folder`` as safetensors with floating tensors in ``dtype``, in shards of at most 5 GB.

    Tensors are cast chunk by chunk while they are written; ``safetensors.torch.save_file`` would need memory for a
    whole shard.
    """
    shapes = {name: torch.empty_like(t, dtype=_target(t, dtype), device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name] for name in names}, dtype)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _untied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the model's state dict with every tied tensor under its first name only."""
    kept = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept or name not in every}


def _target(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``tensors`` to one safetensors file chunk by chunk, floating ones in ``dtype`` (default: unchanged)."""
    # The widest dtype first keeps every tensor aligned, as the format requires.
    order = sorted(tensors, key=lambda name: (-_target(tensors[name], dtype).itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        target = _target(tensors[name], dtype)
        start, end = end, end + tensors[name].numel() * target.itemsize
        header[name] = {"dtype": _CODES[target], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for chunk in tensors[name].detach().reshape(-1).split(CHUNK):
                chunk = chunk.to("cpu", _target(tensors[name], dtype)).contiguous()
                handle.write(memoryview(chunk.view(torch.uint8).numpy()))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index} is not an index of safetensors shards ({error!r}); download it again") from error


def _check(file: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{file} is named by {INDEX_FILE} but missing: download the checkpoint again")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error


def _no_weights(folder: Path) -> str:
    return (
        f"{folder} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}. zoft does not open pickles "
        "(pytorch_model.bin): convert them with transformers, or use a Hub revision with safetensors, such as "
        "org/name@refs/pr/1"
    )
