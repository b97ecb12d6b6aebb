"""Dtypes of stored weights and of update arithmetic."""

import torch

HALF = (torch.bfloat16, torch.float16)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which updates of weights of ``dtype`` are computed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
