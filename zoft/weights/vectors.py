"""Keep the vectors of a half-precision model (norms, biases) in float32, and compute with them in float32.

A perturbation of 1e-3 on a norm weight of 1.0 is below half a bf16 step and would be lost. Vectors take under 0.1 % of
the memory and have most of the gradient per weight.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch.nn import functional

from zoft.weights.dtypes import HALF
from zoft.weights.reading import Layer, run_in


def install_fp32_vectors(model: torch.nn.Module) -> list[str]:
    """Keep the trainable vectors of a half-precision ``model`` in float32; return the names of those converted.

    Every module that owns such a vector computes with it in float32 and casts its output back, so that the rest of the
    model sees the same dtype as before. This works for any module whose ``forward`` uses torch functions;
    ``state_dict``, copies and saving work as before. Calling it again has no effect.
    """
    converted = []
    for prefix, module in model.named_modules():
        vectors = [
            (name, parameter)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim <= 1 and parameter.requires_grad and parameter.dtype in HALF
        ]
        for name, parameter in vectors:
            parameter.data = parameter.data.float()
            converted.append(f"{prefix}.{name}" if prefix else name)
        if vectors:
            run_in(module, Float32Vectors)
    return converted


class Float32Vectors(Layer):
    """Layer in which functions of ``vectors`` compute in float32 and return the dtype of their other arguments."""

    def __init__(self, vectors: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self._vectors = {id(vector) for vector in vectors}

    @classmethod
    def of(cls, module: torch.nn.Module) -> Self:
        """Return the layer for the vectors that ``module`` owns."""
        return cls([parameter for parameter in module.parameters(recurse=False) if parameter.ndim <= 1])

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call ``func``, in float32 if it reads a vector beside half-precision tensors."""
        values = [*args, *kwargs.values()]
        if self._vectors.isdisjoint(map(id, values)):
            return func(*args, **kwargs)
        half = [v for v in values if id(v) not in self._vectors and isinstance(v, torch.Tensor) and v.dtype in HALF]
        if not half:
            return func(*args, **kwargs)
        if func is functional.linear:
            return _linear(*args, **kwargs)
        wide = {id(value): value.float() for value in half}
        args = tuple(wide.get(id(value), value) for value in args)
        result = func(*args, **{key: wide.get(id(value), value) for key, value in kwargs.items()})
        return (
            result.to(half[0].dtype) if isinstance(result, torch.Tensor) and result.dtype == torch.float32 else result
        )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the matrix product in half precision plus the float32 bias, with the sum rounded once."""
    return (functional.linear(x, weight) + bias).to(x.dtype)
