"""Batches of few shapes: sizes rounded up to a bucket's, so that what is made for a shape serves many batches."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from zoft.tasks.batches import Laid
from zoft.tasks.packing import CAPACITY


def bucket(size: int, step: int = 1) -> int:
    """Return ``size`` rounded up, by a quarter at most where it is large, and to a multiple of ``step``.

    >>> [bucket(size) for size in (1, 5, 7, 9, 17, 30)], bucket(9, 8)
    ([1, 5, 7, 10, 20, 32], 16)
    """
    step = max(step, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def padded(laid: Laid, filler: int) -> Laid:
    """Return the packed ``laid`` filled up to the sizes of a bucket, with the same loss up to rounding.

    Rows of padding and longer rows read nothing of the batch; the targets that fill up belong to a choice of no
    example. Sums over targets and over the choices of an example have zeros more, and none of their own numbers less.
    """
    arrays = dict(laid.arrays)
    rows, length = arrays["input_ids"].shape
    shape = bucket(rows), -(-length // CAPACITY) * CAPACITY
    for name, value in (("input_ids", filler), ("position_ids", 0), ("owner", -1), ("branch", 0)):
        arrays[name] = np.full(shape, value, dtype=np.int64)
        arrays[name][:rows, :length] = laid.arrays[name]
    choices = bucket(len(arrays["counts"]) + 1)
    fill = {
        **dict.fromkeys(("logit_row", "logit_position"), (bucket(len(arrays["logit_row"]), 8), 0)),
        **dict.fromkeys(("logit", "token", "place"), (bucket(len(arrays["logit"]), 8), 0)),
        "segment": (bucket(len(arrays["logit"]), 8), choices - 1),
        "counts": (choices, 1),
        "example": (choices, laid.examples),
        "column": (choices, 0),
    }
    for name, (size, value) in fill.items():
        arrays[name] = np.append(arrays[name], np.full(size - len(arrays[name]), value, dtype=np.int64))
    return replace(laid, arrays=arrays, most=bucket(laid.most), first_position=0)


def shape_of(laid: Laid) -> tuple[object, ...]:
    """Return what two batches have to have in common for the tensors of one to take the numbers of the other."""
    shapes: Mapping[str, tuple[int, ...]] = {name: array.shape for name, array in laid.arrays.items()}
    return laid.packed, laid.most, laid.first_position, laid.examples, laid.columns, *shapes.items()
