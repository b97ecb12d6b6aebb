"""Release and reuse memory; copy small arrays to a device and back in few transfers."""

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

TRIM_SECONDS = 0.25  # between trims of a loop: a trim takes about a millisecond


def release() -> None:
    """Collect reference cycles, and return freed heap to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Return freed heap to the system.

    The C library keeps freed memory; weights or mapped files that are loaded next into other pages would add to it.
    Only glibc supports this; elsewhere nothing happens.
    """
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


class Trimmer:
    """Trim the heap of a loop at intervals: work buffers of new lengths leave holes in it."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def trim_if_due(self) -> None:
        """Call `trim` if the last call is at least `TRIM_SECONDS` ago."""
        if time.monotonic() - self._last >= TRIM_SECONDS:
            trim()
            self._last = time.monotonic()


class Buffers:
    """Reusable flat work buffers: one per use, dtype and device, as large as the largest request."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, use: str, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return ``(size,)`` uninitialised numbers, valid until the next call for the same use."""
        key = (use, dtype, device)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            held = self._held[key] = torch.empty(size, dtype=dtype, device=device)
        return held[:size]


def send_arrays(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return ``arrays``, all of one dtype, as tensors on ``device``, in one copy for which the host does not wait.

    >>> send_arrays({"a": np.zeros((2, 3), dtype=np.int64), "b": np.ones(1, dtype=np.int64)}, "cpu")["b"]
    tensor([1])
    """
    return unflatten(to_device(flatten(arrays), device), arrays)


def flatten(arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Return the numbers of ``arrays`` concatenated in one flat tensor in host memory."""
    return torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))


def unflatten(flat: torch.Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return views of ``flat``, as made by `flatten`, with the shapes of ``arrays``."""
    pieces = flat.split([array.size for array in arrays.values()])
    return {name: piece.view(array.shape) for (name, array), piece in zip(arrays.items(), pieces, strict=True)}


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return ``tensor``, which is in host memory and not changed afterwards, on ``device``.

    Copies to a GPU go through page-locked memory: others wait for all work queued on the GPU.
    """
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fetch(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return ``tensors`` in float64 on the CPU, with one copy for each device and dtype.

    Their shapes are the same except for the first dimension.
    """
    found: dict[int, torch.Tensor] = {}
    for kind in dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors):
        same = [i for i, tensor in enumerate(tensors) if (tensor.device, tensor.dtype) == kind]
        together = torch.cat([tensors[i] for i in same]).to("cpu", torch.float64)
        found |= zip(same, together.split([len(tensors[i]) for i in same]), strict=True)
    return [found[i] for i in range(len(tensors))]


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated by torch on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
