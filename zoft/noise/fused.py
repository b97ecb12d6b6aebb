"""Perturb and update weights on a GPU: one kernel launch per layer, one for all blocks (`zoft.noise.kernels`).

Used if the weights are on a CUDA device and Triton works there, which is tried once. Otherwise, for float64 weights and
for embeddings with more than 2**16 numbers in a row, plain torch is used, against which the kernels are tested. Updated
weights are the same to the bit. A perturbed weight may differ in its last bit: torch contracts the product and the sum
of ``add(alpha=)``.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zoft.memory import to_device
from zoft.noise.rounding import round_stochastically

DROPPED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 mantissa
LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


def interpreted() -> bool:
    """Return whether Triton interprets its kernels on tensors in host memory, one program after another; for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(weights: torch.Tensor) -> bool:
    """Return whether the kernels support ``weights``: their device and dtype."""
    here = weights.device.type == "cuda" or (interpreted() and weights.device.type == "cpu")
    return here and weights.dtype in DROPPED_BITS and triton_works(weights.device)


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Return whether Triton runs on ``device`` with the results of plain torch; warn if it fails."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        problem = None if _agrees(device) else "its results are wrong"
    except Exception as error:  # no C compiler, no driver, another interface: Triton raises various types
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        warnings.warn(
            f"Triton does not work on {device} ({problem}): plain torch is used, which is slower",
            stacklevel=2,
        )
    return problem is None


def _agrees(device: torch.device) -> bool:
    """Return whether a small matrix is perturbed and updated as by plain torch, with every operation rounded."""
    table, theta = (torch.linspace(-end, 1, size, device=device).bfloat16() for end, size in ((3, 96), (1, 32)))
    dither = torch.arange(0, 2**16, 641, dtype=torch.int32, device=device)
    places = Places(torch.tensor([[5, 9, float_bits(0.1)]], dtype=torch.int32, device=device), {"": 0})
    before, step = theta.float(), table.float().as_strided((4, 8), (9, 1), 5).flatten() * 0.1
    drawn = dither.as_strided((4, 8), (2, 1), 1).flatten()
    perturbed = perturb(before, torch.empty_like(before), table, places, "", (0, 32), (8, 32), 1)
    row = perturb_rows(before.view(4, 8), torch.tensor([2], device=device), table, places, "", (8, 32), -1)
    update([Chunk(theta.data_ptr(), 32, 8, 0.7, (1, 2), ((5, 9, 0.1),))], theta.dtype, table, dither)
    updated = round_stochastically(before * 0.7 - step, drawn, theta.dtype)
    pairs = ((perturbed, before + step), (row[0], (before - step)[16:24]), (theta, updated))
    return all(torch.equal(found, expected) for found, expected in pairs)


def float_bits(number: float) -> int:
    """Return the bits of ``number`` rounded to float32, as an int32 number.

    >>> float_bits(1.0)
    1065353216
    """
    return int(np.float32(number).view(np.int32))


@dataclass(frozen=True)
class Places:
    """Table positions and step lengths of the chunks of blocks: ``rows`` ``(chunks, 3)`` int32 on a device.

    Each row holds place, stride, and the bits of ``|eps| * s * sign`` in float32. The rows of a block start at
    ``first[name]``.
    """

    rows: torch.Tensor
    first: Mapping[str, int]


def perturb(
    theta: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    places: Places,
    name: str,
    span: tuple[int, int],
    shape: tuple[int, int],
    side: int,
) -> torch.Tensor:
    """Write ``theta + side * step * z`` for the flat range ``span`` of the block called ``name`` into ``out``.

    ``theta`` is the whole block; ``shape`` is the width of its rows and the length of its chunks.
    """
    from zoft.noise import kernels

    (start, stop), (width, length) = span, shape
    tile = _tile(min(length, theta.numel()))
    grid = (-(-min(length, theta.numel()) // tile), -(-stop // length) - start // length)
    with torch.cuda.device_of(theta):
        kernels.perturb[grid](
            theta,
            out,
            table,
            places.rows,
            places.first[name],
            start,
            stop,
            WIDTH=width,
            LENGTH=length,
            SIDE=side,
            TILE=tile,
            **LAUNCH_OPTIONS,
        )
    return out


def perturb_rows(
    theta: torch.Tensor,
    ids: torch.Tensor,
    table: torch.Tensor,
    places: Places,
    name: str,
    shape: tuple[int, int],
    side: int,
) -> torch.Tensor:
    """Return ``theta + side * step * z`` at the rows ``ids`` of a matrix, ``(*ids.shape, width)``."""
    from zoft.noise import kernels

    width, length = shape
    out = theta.new_empty(*ids.shape, width)
    tile = min(_tile(width), 1 << (width - 1).bit_length())
    if ids.numel():
        with torch.cuda.device_of(theta):
            kernels.perturb_rows[ids.numel(), -(-width // tile)](
                theta,
                out,
                table,
                places.rows,
                places.first[name],
                ids.contiguous(),
                WIDTH=width,
                ROWS=length // width,
                SIDE=side,
                TILE=tile,
                **LAUNCH_OPTIONS,
            )
    return out


@dataclass(frozen=True)
class Chunk:
    """A chunk of weights for `update`: its address and size, its moves and its rounding.

    ``steps`` holds (place, stride, step) of every probe, ``dither`` a place and a stride.
    """

    address: int
    size: int
    width: int
    keep: float
    dither: tuple[int, int]
    steps: tuple[tuple[int, int, float], ...]

    @property
    def aligned(self) -> bool:
        """Whether the kernel can read and write it 16 bytes at a time."""
        return self.address % 16 == self.size % 16 == 0


def update(chunks: list[Chunk], dtype: torch.dtype, table: torch.Tensor, dither: torch.Tensor | None) -> None:
    """Set ``chunks`` of weights of ``dtype`` to ``theta * keep - sum of z * step``; all have the same number of probes.

    Results are rounded once, as by `zoft.noise.rounding.Dither`. One launch, or two if some chunks are not aligned.
    """
    for aligned in (True, False):
        if chosen := [chunk for chunk in chunks if chunk.aligned is aligned]:
            _update(chosen, dtype, table, dither, aligned)


def _update(
    chunks: list[Chunk], dtype: torch.dtype, table: torch.Tensor, dither: torch.Tensor | None, aligned: bool
) -> None:
    import triton.language

    from zoft.noise import kernels

    probes = len(chunks[0].steps)
    numbers = np.empty((len(chunks), 5 + 3 * probes), dtype=np.int32)
    for row, chunk in zip(numbers, chunks, strict=True):
        moves = (number for place, stride, step in chunk.steps for number in (place, stride, float_bits(step)))
        row[:] = [chunk.size, chunk.width, float_bits(chunk.keep), *chunk.dither, *moves]
    addresses = np.array([chunk.address for chunk in chunks], dtype=np.int64)
    largest = max(chunk.size for chunk in chunks)
    tile = _tile(largest)
    tiles = -(-largest // tile)
    with torch.cuda.device_of(table):
        # The copies end before the kernel begins: they are in its stream.
        kernels.update[(len(chunks) * tiles,)](
            to_device(torch.from_numpy(addresses), table.device),
            to_device(torch.from_numpy(numbers), table.device),
            table,
            table if dither is None else dither,
            tiles,
            probes,
            DTYPE=getattr(triton.language, str(dtype).removeprefix("torch.")),
            DROPPED=DROPPED_BITS[dtype],
            ALIGNED=aligned,
            TILE=tile,
            **LAUNCH_OPTIONS,
        )


def _tile(numbers: int) -> int:
    """Return the size of a tile, what one program does, of ``numbers``: large where programs run one after another."""
    return min(2**15, 1 << (numbers - 1).bit_length()) if interpreted() else 1024
