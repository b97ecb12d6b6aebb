"""Parameter groups of an optimizer: named, and seen as blocks."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from zoft.errors import ModelError
from zoft.weights.blocks import Block, trainable_blocks

Parameters = torch.nn.Module | Iterable[Any]


def named_groups(params: Parameters) -> list[dict[str, Any]]:
    """Parameter groups of (name, parameter) pairs; unnamed parameters are named by their position."""
    if isinstance(params, torch.nn.Module):
        return [{"params": [(block.name, block.parameter) for block in trainable_blocks(params)]}]
    given = list(params)
    groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    named, position = [], 0
    for group in groups:
        members = group["params"]
        pairs = []
        for member in [members] if isinstance(members, torch.Tensor) else members:
            pairs.append(member if isinstance(member, tuple) else (str(position), member))
            position += 1
        named.append({**group, "params": pairs})
    return named


def blocks_of(group: dict[str, Any]) -> list[Block]:
    """Return the blocks of a parameter group."""
    return [Block(name, p) for name, p in zip(group.get("param_names", ()), group["params"], strict=True)]


def check_blocks(blocks: list[Block]) -> None:
    """Raise `ModelError` unless ``blocks`` can be trained: some, of different names, floating-point and contiguous."""
    if not any(block.size for block in blocks):
        raise ModelError("no trainable parameters: every parameter has requires_grad=False")
    names = [block.name for block in blocks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"two blocks have the same name, {twice[0]!r}: the noise of a block is a function of its name")
    for block in blocks:
        if not block.parameter.is_floating_point():
            raise ModelError(f"block {block.name!r} has dtype {block.parameter.dtype}: expected a floating-point dtype")
        if not block.parameter.is_contiguous():
            raise ModelError(
                f"block {block.name!r} is not contiguous: set parameter.data = parameter.data.contiguous()"
            )


def commonest_dtype(blocks: list[Block]) -> torch.dtype:
    """Return the dtype that most weights have."""
    sizes: dict[torch.dtype, int] = {}
    for block in blocks:
        sizes[block.parameter.dtype] = sizes.get(block.parameter.dtype, 0) + block.size
    return max(sizes, key=lambda dtype: sizes[dtype])
