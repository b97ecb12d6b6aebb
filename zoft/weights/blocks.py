"""Blocks: the trainable parameter tensors of a model, which an optimizer perturbs and scales one by one."""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from zoft.memory import fetch

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.|^base_model\.model\.")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_IN_ADAPTER = re.compile(r"(^|\.)(lora_[AB]|prompt_encoder)\.")
_CHUNK = {"cpu": 2**19}  # weights in float32 at a time: fewer cost calls, more cost cache misses
_CHUNK_ELSEWHERE = 2**24


Mode = Literal["full", "lora", "prefix"]  # what is trained: all weights, or an adapter's


@dataclass(frozen=True, eq=False)
class Block:
    """One trainable parameter tensor under the name it has in the unwrapped model; tied tensors are one block."""

    name: str
    parameter: torch.nn.Parameter

    @functools.cached_property  # read thousands of times in a step
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.parameter.shape)

    @functools.cached_property
    def size(self) -> int:
        """Number of weights, ``d_i``."""
        return self.parameter.numel()

    @property
    def in_adapter(self) -> bool:
        """Whether it belongs to LoRA or a prefix, by the names that peft uses.

        >>> Block("q_proj.lora_A.default.weight", torch.nn.Parameter(torch.zeros(8, 64))).in_adapter
        True
        """
        return _IN_ADAPTER.search(self.name) is not None


def trainable_blocks(model: torch.nn.Module) -> list[Block]:
    """Return the blocks of ``model`` in the order of ``named_parameters()``.

    Parameters with ``requires_grad=False`` are not blocks; a tied tensor appears once, under its first name. Prefixes
    of wrappers (PEFT's ``base_model.model.``, ``module.``, ``_orig_mod.``) are removed, so that names do not depend on
    wrapping.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    >>> [(b.name, b.shape, b.size) for b in trainable_blocks(model)][:2]
    [('0.weight', (2, 3), 6), ('0.bias', (2,), 2)]
    """
    return [
        Block(_WRAPPERS.sub(r"\1", name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def layer_of(name: str) -> str | None:
    """Return the layer of the block called ``name``, the first number in it; None outside of layers.

    >>> layer_of("model.layers.3.mlp.weight"), layer_of("norm.weight")
    ('3', None)
    """
    match = _LAYER.search(name)
    return match[1] if match else None


def layers_of(blocks: Sequence[Block]) -> list[str]:
    """Return the layers of ``blocks`` in their order."""
    return list(dict.fromkeys(layer for block in blocks if (layer := layer_of(block.name)) is not None))


def statistics(blocks: Sequence[Block]) -> torch.Tensor:
    """Return mean and population variance of every block as ``(n, 2)`` float64 on the CPU.

    Sums are in float32 or better over chunks (2**19 weights on a CPU) and combined in float64: nothing of a block's
    size is allocated, and half-precision weights lose no digits. The variance takes two passes, so that it is accurate
    for a large mean.

    >>> statistics([Block("w", torch.nn.Parameter(torch.tensor([1.0, 3.0])))]).tolist()
    [[2.0, 1.0]]
    """
    pieces = [_chunk_moments_of(block.parameter.detach()) for block in blocks]
    on_host = fetch([rows for rows, _ in pieces])
    return torch.stack([_joined(rows, sizes) for rows, (_, sizes) in zip(on_host, pieces, strict=True)])


def architecture_hash(blocks: Sequence[Block]) -> str:
    """Return the SHA-256 hex digest of the blocks' names and shapes, in their order.

    A key for finding tuners: checkpoints of one architecture share it.
    """
    entries = [[block.name, list(block.shape)] for block in blocks]
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()


def _chunk_moments_of(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and squared deviations ``(chunks, 2)`` of a tensor's chunks, on its device, and the chunks' sizes."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    chunks = weights.reshape(-1).split(_CHUNK.get(weights.device.type, _CHUNK_ELSEWHERE))
    rows = torch.stack([_chunk_moments(chunk.to(dtype)) for chunk in chunks])
    return rows, torch.tensor([len(chunk) for chunk in chunks], dtype=torch.float64)


def _joined(rows: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return mean and variance of the whole from those of its chunks, by Chan's formula."""
    mean = (sizes * rows[:, 0]).sum() / sizes.sum()
    squares = rows[:, 1].sum() + (sizes * (rows[:, 0] - mean).square()).sum()
    return torch.stack([mean, squares / sizes.sum()])


def _chunk_moments(chunk: torch.Tensor) -> torch.Tensor:
    """Return mean and sum of squared deviations; much faster than ``torch.var_mean``, which is serial on a CPU."""
    mean = chunk.mean()
    return torch.stack([mean, (chunk - mean).square_().sum()])
