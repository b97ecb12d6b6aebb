"""The parameter blocks of a model: what a zeroth-order optimizer perturbs, measures and scales one by one."""

import re
from dataclasses import dataclass

import torch

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod)\.|^base_model\.model\.")


@dataclass(frozen=True, eq=False)
class Block:
    """One trainable parameter tensor under the name it has in the unwrapped model; tied tensors are one block."""

    name: str
    parameter: torch.nn.Parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.parameter.shape)

    @property
    def size(self) -> int:
        """Number of weights, ``d_i``."""
        return self.parameter.numel()


def trainable_blocks(model: torch.nn.Module) -> list[Block]:
    """Return the blocks of ``model`` in the order of ``named_parameters()``.

    Parameters with ``requires_grad=False`` are no blocks; a tied tensor appears once, under its first name. Names
    carry no prefix of a wrapper (PEFT's ``base_model.model.``, ``module.``, ``_orig_mod.``), so that they stay the
    same however the model is wrapped.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    >>> [(b.name, b.shape, b.size) for b in trainable_blocks(model)][:2]
    [('0.weight', (2, 3), 6), ('0.bias', (2,), 2)]
    """
    return [
        Block(_WRAPPERS.sub(r"\1", name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
