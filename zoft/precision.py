"""Half precision done right: vectors in float32, updates rounded stochastically.

An update of 1e-7 is below half a bf16 step of most weights: rounded to nearest it is lost, rounded stochastically it is
kept in the mean. And a perturbation of 1e-3 on a norm weight of 1.0 is below half a bf16 step too, so one-dimensional
parameters (norms, biases: under 0.1 % of the memory, most of the gradient per weight) live and compute in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zoft.blocks import Block
from zoft.noise import chunk_length, layout, row_length
from zoft.within import run_within

HALF = (torch.bfloat16, torch.float16)
DITHER_SIZE = 2**18
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32 mantissa
_SMALLEST_NORMAL = 2.0**-14  # of float16; below it the spacing no longer shrinks


# -- vectors in float32 -------------------------------------------------------------------------------------------


def install_fp32_vectors(model: torch.nn.Module) -> list[str]:
    """Keep the trainable vectors of a half-precision ``model`` in float32; return the names of those converted.

    Every module that owns such a vector computes with it in float32 and casts its output back, so the rest of the
    model sees the dtype it knows. Works for any module whose ``forward`` uses torch functions; ``state_dict``, copies
    and saving work as before. Calling it again changes nothing.
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
            run_within(module, _Fp32Vectors, _in_float32)
    return converted


class _Fp32Vectors:
    """Mixed into the class of a module that owns float32 vectors among half-precision tensors."""


def _in_float32(module: torch.nn.Module) -> "_ComputeInFloat32":
    return _ComputeInFloat32([p for p in module.parameters(recurse=False) if p.ndim <= 1])


class _ComputeInFloat32(TorchFunctionMode):
    """A function that reads one of ``vectors`` computes in float32 and returns the dtype of its other arguments."""

    def __init__(self, vectors: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self._vectors = {id(vector) for vector in vectors}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        if not any(id(value) in self._vectors for value in values):
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
    """The matrix product in half precision; the float32 bias is added apart, and the sum rounded once."""
    return (functional.linear(x, weight) + bias).to(x.dtype)


# -- stochastic rounding ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)  # a run on many GPUs reads one on each
def dither_table(seed: int, device: torch.device) -> torch.Tensor:
    """Return the run's ``(DITHER_SIZE,)`` int32 numbers, uniform on 0 .. 65535: numpy's Philox keyed by the seed.

    Two bytes would hold them, but widening them at every use costs a third of the rounding.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
    table = generator.integers(0, 2**16, DITHER_SIZE, dtype=np.int32)
    return torch.from_numpy(table).to(device)


class Dither:
    """The seeded uniform numbers that round one block once, read like the noise: a place and a stride for each chunk.

    Rows may overlap: a number of the table may round several weights of a chunk, never two of a row. ``key`` names the
    update, ``seed`` the table.
    """

    def __init__(self, block: Block, key: str, seed: int) -> None:
        width = row_length(block)
        rows = -(-min(chunk_length(block), block.size) // width)
        strides = max(1, (DITHER_SIZE // 2 - width) // rows)
        self.layout = layout(key, block, DITHER_SIZE, (1, strides))
        self.table = dither_table(seed, block.parameter.device)

    def round_(self, values: torch.Tensor, lo: int, out: torch.Tensor) -> None:
        """Round the float32 ``values``, which stand at ``lo`` in the block, into the flat ``out`` of half precision.

        ``values`` is used as working memory and is not valid afterwards.
        """
        for start, stop, dither, _ in self.layout.windows(self.table, lo, lo + values.numel()):
            piece = values[start - lo : stop - lo].view(dither.shape)
            out[start - lo : stop - lo].view(dither.shape).copy_(_round_(piece, dither, out.dtype))


def round_stochastically(values: torch.Tensor, dither: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 ``values`` to ``dtype`` (bfloat16 or float16), up or down with the probability that keeps the mean.

    ``dither`` are as many int32 numbers, uniform on 0 .. 65535. A number that ``dtype`` can represent stays itself.
    ``values`` is used as working memory and is not valid afterwards.

    >>> x = torch.full((65536,), 1 + 2.0**-9)  # a quarter of the way from 1 to the next bfloat16, 1 + 2**-7
    >>> y = round_stochastically(x, torch.arange(65536, dtype=torch.int32), torch.bfloat16)
    >>> y.unique().tolist(), y.float().mean().item()
    ([1.0, 1.0078125], 1.001953125)
    """
    return _round_(values, dither, dtype).to(dtype)


def _round_(values: torch.Tensor, dither: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Make ``values`` float32 numbers that ``dtype`` can represent."""
    bits = _DROPPED_BITS[dtype]
    if bits < 16:
        dither = dither >> (16 - bits)
    if dtype is torch.float16:
        shift = torch.copysign((values.abs() < _SMALLEST_NORMAL) * _SMALLEST_NORMAL, values)
        return _dithered(values.add_(shift), dither, bits).sub_(shift)
    return _dithered(values, dither, bits)


def _dithered(values: torch.Tensor, dither: torch.Tensor, bits: int) -> torch.Tensor:
    """Add ``dither`` below the last kept bit of the magnitude, then cut the ``bits`` below it off."""
    values.view(torch.int32).add_(dither).bitwise_and_(-1 << bits)
    return values
