"""Fingerprint of a model: the hash of its stored weights, the hash of its architecture, its files."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from zoft.model import adapters
from zoft.model.checkpoint import StoredTensor, stored_dtype, stored_tensors, weight_files
from zoft.model.config import meta_model, read_config
from zoft.model.hashes import cached, file_digest
from zoft.model.sources import resolve
from zoft.weights.blocks import architecture_hash, trainable_blocks

READ_SIZE = 1 << 22  # bytes that one thread reads at a time
_FORMER_BUFFERS = (r"rotary_emb\.inv_freq$",)  # stored per layer by older releases of transformers


class BlockShape(BaseModel):
    """Name, shape and number of weights of a block."""

    model_config = ConfigDict(frozen=True)
    name: str
    shape: tuple[int, ...]
    size: int


class WeightFile(BaseModel):
    """A file of the checkpoint's weights: name, size in bytes, SHA-256 of its content."""

    model_config = ConfigDict(frozen=True)
    name: str
    size: int
    sha256: str


class Fingerprint(BaseModel):
    """The identity of a checkpoint; ``source`` is the model as the user named it.

    For an adapter, hashes, dtype and files are the base's, parameters and blocks the adapter's; ``adapter`` holds its
    settings.
    """

    model_config = ConfigDict(frozen=True)
    source: str
    base_hash: str
    architecture_hash: str
    stored_dtype: str
    parameters: int
    blocks: list[BlockShape]
    files: list[WeightFile]
    adapter: dict[str, Any] | None = None


def fingerprint(model: str | Path) -> Fingerprint:
    """Return the fingerprint of a Hub id, a folder or a ``.gguf`` file; no weights are loaded.

    >>> fingerprint("HuggingFaceTB/SmolLM2-135M").parameters  # doctest: +SKIP
    134515008
    """
    found = resolve(model)
    folder = found.path
    shapes = meta_model(read_config(folder))
    blocks = trainable_blocks(shapes)
    architecture, adapter = architecture_hash(blocks), None
    if found.adapter is not None:
        wrapped = adapters.read(shapes, found.adapter)
        blocks, settings = trainable_blocks(wrapped), adapters.adapter_of(wrapped)
        adapter = None if settings is None else {"kind": settings.mode, **settings.model_dump(mode="json")}
    return Fingerprint(
        source=str(model),
        base_hash=base_hash(folder),
        architecture_hash=architecture,
        stored_dtype=str(stored_dtype(folder)).removeprefix("torch."),
        parameters=sum(block.size for block in blocks),
        blocks=[BlockShape(name=block.name, shape=block.shape, size=block.size) for block in blocks],
        files=describe_files(weight_files(folder)),
        adapter=adapter,
    )


def architecture_of(folder: Path) -> str:
    """Return the architecture hash of the model in ``folder``, from its configuration alone."""
    return architecture_hash(trainable_blocks(meta_model(read_config(folder))))


def base_hash(path: Path) -> str:
    """Return the base hash of the model folder ``path``: one SHA-256 over all stored weights.

    It is the digest of one JSON line ``[name, stored dtype, shape, SHA-256 of the bytes]`` per stored tensor, sorted
    by name. Tied tensors count once, under the name of their block; two tensors that merely have equal values count
    both. Buffers are left out. So the hash is the same for one file or many shards, and with or without a stored
    copy of a tied head. Tensors are hashed in parallel, each in pieces of 4 MB, and the result is cached.
    """
    files = [*weight_files(path), path / "config.json"]  # the configuration determines what is tied
    return cached("base", files, lambda: compute_base_hash(path))


def compute_base_hash(folder: Path) -> str:
    """Return the base hash of ``folder``, not cached."""
    model = meta_model(read_config(folder))
    is_buffer = buffer_test(model)
    tensors = [tensor for tensor in stored_tensors(folder) if not is_buffer(tensor.name)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = dict(zip((t.name for t in tensors), pool.map(_tensor_digest, tensors), strict=True))
    total = hashlib.sha256()
    for name, tensor in sorted(_counted_once(tensors, digests, model).items()):
        line = json.dumps([name, tensor.dtype, list(tensor.shape), digests[tensor.name]], separators=(",", ":"))
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def _tensor_digest(tensor: StoredTensor) -> str:
    digest, left = hashlib.sha256(), tensor.length
    with tensor.file.open("rb", buffering=0) as handle:
        handle.seek(tensor.offset)
        while left:
            piece = handle.read(min(READ_SIZE, left))
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _counted_once(
    tensors: Iterable[StoredTensor], digests: Mapping[str, str], model: PreTrainedModel
) -> dict[str, StoredTensor]:
    """Return tensors by name, with equal stored copies of a tied block as one, under the block's name.

    Copies that differ stay separate, as transformers unties them, too.
    """
    ties = _ties(model)
    copies: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        copies.setdefault(ties.get(_bare(tensor.name, model), tensor.name), []).append(tensor)
    counted: dict[str, StoredTensor] = {}
    for name, group in copies.items():
        same = len({(tensor.dtype, tensor.shape, digests[tensor.name]) for tensor in group}) == 1
        counted |= {name: group[0]} if same else {tensor.name: tensor for tensor in group}
    return counted


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """Return the bare names of the model's tied tensors, each with the name of its block."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {_bare(name, model): group[0] for group in names.values() if len(group) > 1 for name in group}


def buffer_test(model: PreTrainedModel) -> Callable[[str], bool]:
    """Return a test for names of stored tensors: buffers of the model, and tensors that its class ignores."""
    parameters = {_bare(name, model) for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {_bare(name, model) for name, _ in model.named_buffers()}
    patterns = [*_FORMER_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())]

    def is_buffer(name: str) -> bool:
        bare = _bare(name, model)
        return bare in buffers or (bare not in parameters and any(re.search(p, name) for p in patterns))

    return is_buffer


def _bare(name: str, model: PreTrainedModel) -> str:
    """Return the name without the prefix of the base model, which only some checkpoints store."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def describe_files(files: Sequence[Path]) -> list[WeightFile]:
    """Return name, size and SHA-256 of each of ``files``; hashes are cached."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(file_digest, files))
    return [
        WeightFile(name=file.name, size=file.stat().st_size, sha256=digest)
        for file, digest in zip(files, digests, strict=True)
    ]
