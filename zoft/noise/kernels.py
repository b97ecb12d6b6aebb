"""Triton kernels of a step on a GPU: the plain torch code of `direction`, `rounding` and an update rule, fused.

Each chunk of a block has a row in a table of int32 numbers, so that one launch covers all chunks of a layer or of all
blocks, and a captured graph can be replayed for another step. float32 numbers are stored there as their bits.

Products and sums are rounded separately, in the order of the plain path: launch with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first"])
def perturb(
    theta,
    out,
    table,
    places,
    first,
    start,
    stop,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """``out = theta + SIDE * step * z`` on the flat range ``start:stop`` of a block.

    Program (i, k) computes the i-th tile of ``TILE`` numbers of the k-th chunk that overlaps the range. ``places``
    holds (place, stride, step) of every chunk; the block's rows start at ``first``.
    """
    chunk = start // LENGTH + tl.program_id(1)
    within = tl.program_id(0) * TILE + tl.arange(0, TILE)
    begin = chunk.to(tl.int64) * LENGTH
    mask = (within < LENGTH) & (begin + within >= start) & (begin + within < stop)
    row = places + 3 * (first + chunk)
    step = SIDE * tl.load(row + 2).to(tl.float32, bitcast=True)
    at = tl.load(row) + within // WIDTH * tl.load(row + 1) + within % WIDTH
    weights = tl.load(theta + begin + within, mask=mask)
    z = tl.load(table + at, mask=mask).to(weights.dtype).to(tl.float32)
    moved = weights.to(tl.float32) + z * step
    tl.store(out + (begin - start) + within, moved.to(weights.dtype), mask=mask)


@triton.jit(do_not_specialize=["first"])
def perturb_rows(
    theta,
    out,
    table,
    places,
    first,
    ids,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """``out[n] = theta[ids[n]] + SIDE * step * z`` of a matrix whose chunks have ``ROWS`` rows.

    Program (n, i) computes the i-th tile of row n.
    """
    n = tl.program_id(0).to(tl.int64)
    wanted = tl.load(ids + n).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < WIDTH
    row = places + 3 * (first + wanted // ROWS)
    step = SIDE * tl.load(row + 2).to(tl.float32, bitcast=True)
    at = tl.load(row) + (wanted % ROWS).to(tl.int32) * tl.load(row + 1) + column
    weights = tl.load(theta + wanted * WIDTH + column, mask=mask)
    z = tl.load(table + at, mask=mask).to(weights.dtype).to(tl.float32)
    moved = weights.to(tl.float32) + z * step
    tl.store(out + n * WIDTH + column, moved.to(weights.dtype), mask=mask)


@triton.jit
def update(
    pointers,
    rows,
    table,
    dither,
    tiles,
    probes,
    DTYPE: tl.constexpr,
    DROPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """``theta <- theta * keep - sum_p z_p * step_p``, in place, on chunks of any number of blocks.

    ``pointers`` holds the addresses of the chunks; ``ALIGNED``: they and the sizes are multiples of 16. A row of
    ``rows`` holds (size, width, keep, place and stride of the dither) and (place, stride, step) of every probe.
    ``DROPPED`` is the number of bits of a float32 mantissa that the weights lack: 16 for bfloat16 and 13 for float16,
    rounded stochastically; 0 for float32. A chunk has ``tiles`` programs.
    """
    chunk = tl.program_id(0) // tiles
    row = rows + chunk * (5 + 3 * probes)
    size = tl.load(row)
    width = tl.load(row + 1)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    within = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    mask = within < size
    line = within // width
    column = within % width
    weights = tl.load(pointers + chunk).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        weights = tl.multiple_of(weights, 16)
    theta = tl.load(weights + within, mask=mask, other=0).to(tl.float32)
    theta = theta * tl.load(row + 2).to(tl.float32, bitcast=True)
    for probe in range(probes):
        of_probe = row + 5 + 3 * probe
        at = tl.load(of_probe) + line * tl.load(of_probe + 1) + column
        step = tl.load(of_probe + 2).to(tl.float32, bitcast=True)
        theta = theta - tl.load(table + at, mask=mask, other=0).to(tl.float32) * step
    if DROPPED > 0:
        drawn = tl.load(dither + tl.load(row + 3) + line * tl.load(row + 4) + column, mask=mask, other=0)
        if DROPPED < 16:  # float16: below its smallest normal number the spacing no longer shrinks
            small = tl.where(tl.abs(theta) < 2.0**-14, 2.0**-14, 0.0).to(tl.int32, bitcast=True)
            shift = (small | (theta.to(tl.int32, bitcast=True) & -(2**31))).to(tl.float32, bitcast=True)
            theta = theta + shift
            drawn = drawn >> (16 - DROPPED)
        theta = ((theta.to(tl.int32, bitcast=True) + drawn) & -(2**DROPPED)).to(tl.float32, bitcast=True)
        if DROPPED < 16:
            theta = theta - shift
    tl.store(weights + within, theta.to(DTYPE), mask=mask)
