"""Buckets: batch sizes rounded up to few shapes, so that a CUDA graph captured for a shape serves many batches."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from zoft.tasks.batches import HostBatch
from zoft.tasks.packing import CAPACITY


def bucket(size: int, step: int = 1) -> int:
    """Return ``size`` rounded up to a multiple of ``step``, by at most a quarter where it is large.

    >>> [bucket(size) for size in (1, 5, 7, 9, 17, 30)], bucket(9, 8)
    ([1, 5, 7, 10, 20, 32], 16)
    """
    step = max(step, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def padded(batch: HostBatch, filler: int) -> HostBatch:
    """Return the packed ``batch`` padded to the sizes of a bucket, with the same loss up to rounding.

    Added tokens read nothing of the batch, and added targets belong to a choice of no example: sums over targets and
    over the choices of an example get additional zeros.
    """
    arrays = dict(batch.arrays)
    rows, length = arrays["input_ids"].shape
    shape = bucket(rows), -(-length // CAPACITY) * CAPACITY
    for name, value in (("input_ids", filler), ("position_ids", 0), ("owner", -1), ("branch", 0)):
        arrays[name] = np.full(shape, value, dtype=np.int64)
        arrays[name][:rows, :length] = batch.arrays[name]
    choices = bucket(len(arrays["counts"]) + 1)
    fill = {
        **dict.fromkeys(("logit_row", "logit_position"), (bucket(len(arrays["logit_row"]), 8), 0)),
        **dict.fromkeys(("logit", "token", "place"), (bucket(len(arrays["logit"]), 8), 0)),
        "segment": (bucket(len(arrays["logit"]), 8), choices - 1),
        "counts": (choices, 1),
        "example": (choices, batch.examples),
        "column": (choices, 0),
    }
    for name, (size, value) in fill.items():
        arrays[name] = np.append(arrays[name], np.full(size - len(arrays[name]), value, dtype=np.int64))
    return replace(batch, arrays=arrays, most=bucket(batch.most), first_position=0)


def shape_of(batch: HostBatch) -> tuple[object, ...]:
    """Return the shape of a batch: those of one shape can be copied into the same tensors."""
    shapes: Mapping[str, tuple[int, ...]] = {name: array.shape for name, array in batch.arrays.items()}
    return batch.packed, batch.most, batch.first_position, batch.examples, batch.columns, *shapes.items()
