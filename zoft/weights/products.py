"""Fast half-precision matrix products on CPUs without instructions for them: widen weights to float32 in slices.

On such CPUs torch multiplies half-precision matrices one number at a time, four to eight times slower than float32.
Here a slice of the weights that fits into a core's cache is widened and multiplied in float32, and the result rounded
once: the speed of float32, the memory of half precision, and the result of hardware with such instructions.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from zoft.weights.reading import Layer, run_in

SLICE = 2**20  # weights widened at a time

# CPU features for products of each dtype, any one of which is enough; names of `torch.cpu.get_capabilities`.
_INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


@functools.cache
def lacks_instructions(dtype: torch.dtype) -> bool:
    """Return whether this CPU is known to lack instructions for products of ``dtype``; always False beside x86."""
    if dtype not in _INSTRUCTIONS or not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return False
    has = torch.cpu.get_capabilities()
    return has.get("architecture") == "x86_64" and not any(has.get(name) for name in _INSTRUCTIONS[dtype])


def gradient_warning(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return a warning if gradients in ``dtype`` are slow on ``device``, else None."""
    if device.type != "cpu" or not lacks_instructions(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no {name} instructions: gradients take several times the time of float32; try --dtype fp32"


def install(model: torch.nn.Module) -> None:
    """Run every forward pass of ``model`` in `WidenedProducts` if this CPU needs it.

    Calling it again has no effect.
    """
    slow = any(
        parameter.device.type == "cpu" and lacks_instructions(parameter.dtype) for parameter in model.parameters()
    )
    if slow:
        run_in(model, WidenedProducts)


def call_widened(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call ``func``; compute a matrix product that this CPU lacks instructions for in float32, and round it once.

    Not widened are products that need a gradient, for which torch would keep the widened weights, and products with a
    block of `ReplacedWeights`, which calls this function again with the replacement.
    """
    product = WIDENED.get(func)
    if product is not None and is_widened([*args, *kwargs.values()]):
        return product(*args, **kwargs)
    return func(*args, **kwargs)


class WidenedProducts(Layer):
    """Layer that widens matrix products of half-precision tensors."""

    call = staticmethod(call_widened)


def is_widened(values: Sequence[Any]) -> bool:
    """Return whether `call_widened` widens a product of ``values``."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return (
        any(lacks_instructions(tensor.dtype) for tensor in tensors)
        and all(tensor.device.type == "cpu" for tensor in tensors)  # others are copied to the device (`streamed`)
        and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    outputs, width = weight.shape
    x = input.reshape(-1, width).float()
    y = input.new_empty(len(x), outputs)
    step = max(1, SLICE // width)
    for lo in range(0, outputs, step):
        part = None if bias is None else bias[lo : lo + step].float()
        y[:, lo : lo + step] = functional.linear(x, weight[lo : lo + step].float(), part)
    return y.view(*input.shape[:-1], outputs)


def _mm(input: torch.Tensor, mat2: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    return _rounded(torch.mm(input.float(), mat2.float()), input.dtype, out)


def _addmm(
    input: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    wide = torch.addmm(input.float(), mat1.float(), mat2.float(), beta=beta, alpha=alpha)
    return _rounded(wide, mat1.dtype, out)


def _matmul(input: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    return _rounded(torch.matmul(input.float(), other.float()), input.dtype, out)


def _rounded(wide: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    return wide.to(dtype) if out is None else out.copy_(wide)


WIDENED: dict[Any, Callable[..., torch.Tensor]] = {
    functional.linear: _linear,
    torch.mm: _mm,
    torch.Tensor.mm: _mm,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}
