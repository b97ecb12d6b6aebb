"""Bound the caches of compiled matrix kernels that torch keeps on a CPU."""

import math
import os

import torch

# oneDNN's own cache of compiled kernels, and that of torch's layer above it (ideep).
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_kernel_caches(model: torch.nn.Module) -> None:
    """Set environment variables so that no more compiled kernels are kept than passes of ``model`` use.

    A variable that is set already stays. In half precision a matrix product is compiled for every shape, so for every
    length of a batch, and 1,024 kernels are kept, half a megabyte each. Compiling again for a new length takes about
    1 % of a forward pass. Both caches read the environment when they are first used: this has no effect in a process
    that has multiplied before.
    """
    shapes = {parameter.shape for parameter in model.parameters() if parameter.ndim > 1}
    kernels = sum(math.prod(shape[:-2]) for shape in shapes)  # each expert of a mixture has a length of its own
    for name in VARIABLES:
        os.environ.setdefault(name, str(max(8, 2 * kernels)))
