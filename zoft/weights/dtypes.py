"""The dtypes that weights are stored in, and those that updates are computed in."""

import torch

HALF = (torch.bfloat16, torch.float16)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that updates of weights of ``dtype`` are computed in: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
