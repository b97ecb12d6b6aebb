"""The meta-gradient: the gradient of the loss after one zeroth-order step by the scale of every block.

The step is ``theta_1 = theta_0 - lr p u`` with ``u_i = s_i z_i`` and slope ``p``; the meta-loss is ``L(theta_1)``. Its
gradient by ``s`` needs of the two backward passes only one inner product with the noise per block. It is taken as
each block's gradient arrives, which is then freed: no graph over the noise, no copy of the model, no stored ``u``.

    s0_i = <grad_i L(theta_0), z_i>    s1_i = <grad_i L(theta_1), z_i>    n0_i = |grad_i L(theta_0)|^2
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from zoft.memory import fetch
from zoft.noise.direction import NoiseDirection
from zoft.weights.blocks import Block

Closure = Callable[[], torch.Tensor]  # the differentiable loss of a batch
Estimator = Literal["control_variate", "exact", "detached"]
_DOT = 2**16  # numbers added in their own dtype


def two_point_slope(losses: tuple[float, float], eps: float) -> float:
    """Return ``(L+ - L-) / (2 eps)``, the slope of the loss along the direction of a probe.

    >>> two_point_slope((2.0, 1.0), eps=0.25)
    2.0
    """
    return (losses[0] - losses[1]) / (2 * eps)


def exact(lr: float, slope: float, s0: torch.Tensor, s1: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return ``dL(theta_1)/ds_i = -lr (p s1_i + s0_i sum_j s_j s1_j)``, ``(n,)``.

    The second term is the dependence of the slope on the scales. With ``p = sum_j s_j s0_j`` this is exact; with the
    two-point slope of a probe the error is of second order in eps.
    """
    return -lr * (slope * s1 + s0 * (scales @ s1))


def detached_slope(lr: float, slope: float, s1: torch.Tensor) -> torch.Tensor:
    """Return ``-lr p s1_i``: the slope taken as a constant, as the published code does."""
    return -lr * slope * s1


def control_variate(
    lr: float, s0: torch.Tensor, s1: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Return an estimate with the mean of `exact` over the noise and much less spread, ``(n,)``.

    ``G_i = -lr (2 s_i n0_i + c (s1_i - s0_i) + s0_i (c1 - c))`` with ``c = sum_j s_j s0_j``, ``c1 = sum_j s_j s1_j``:
    the value of `exact` for a linear loss, ``-2 lr c s0_i``, is replaced by its mean, and only the curvature
    stays noisy.
    """
    c, c1 = scales @ s0, scales @ s1
    return -lr * (2 * scales * squared_norms + c * (s1 - s0) + s0 * (c1 - c))


def lr_gradient(
    lr: float, s0: torch.Tensor, s1: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor
) -> float:
    """Return an estimate of ``dL(theta_1)/d log lr`` with the same control variate.

    The derivative is ``-lr c c1``; the mean of ``c^2``, ``sum_i s_i^2 n0_i``, is known, and only ``c (c1 - c)`` is
    random. Where its mean is zero, the learning rate is best for the curvature along random directions.
    """
    c, c1 = scales @ s0, scales @ s1
    return float(-lr * (scales.square() @ squared_norms + c * (c1 - c)))


def plain_lr_gradient(lr: float, slope: float, s1: torch.Tensor, scales: torch.Tensor) -> float:
    """Return ``dL(theta_1)/d log lr = -lr p c1``, also where the slope is of another batch than the loss."""
    return float(-lr * slope * (scales @ s1))


def mean_gradient(
    estimator: Estimator,
    lr: float,
    slopes: Sequence[float],
    start: "Products",
    afters: Sequence[torch.Tensor],
    scales: torch.Tensor,
) -> torch.Tensor:
    """Return the mean over the probes of the estimates of ``dL(theta_1)/ds``, ``(n,)``.

    Args:
        estimator: which of `control_variate`, `exact` and `detached_slope`.
        lr: learning rate of the zeroth-order step.
        slopes: slope of each probe.
        start: inner products of the backward pass at ``theta_0``.
        afters: ``s1`` of each probe, ``(n,)``.
        scales: ``s``, ``(n,)``.
    """
    estimates = []
    for slope, s0, s1 in zip(slopes, start.with_noise, afters, strict=True):
        if estimator == "control_variate":
            estimates.append(control_variate(lr, s0, s1, start.squared_norms, scales))
        elif estimator == "exact":
            estimates.append(exact(lr, slope, s0, s1, scales))
        else:
            estimates.append(detached_slope(lr, slope, s1))
    return torch.stack(estimates).mean(0)


def mean_lr_gradient(
    lr: float,
    slopes: Sequence[float],
    start: "Products | None",
    afters: Sequence[torch.Tensor],
    scales: torch.Tensor,
) -> float:
    """Return the mean over the probes of `lr_gradient`; of `plain_lr_gradient` without ``start``.

    ``start`` is None if the backward pass at ``theta_0`` was on another batch than the meta-loss.
    """
    if start is None:
        estimates = [plain_lr_gradient(lr, slope, s1, scales) for slope, s1 in zip(slopes, afters, strict=True)]
    else:
        both = zip(start.with_noise, afters, strict=True)
        estimates = [lr_gradient(lr, s0, s1, start.squared_norms, scales) for s0, s1 in both]
    return sum(estimates) / len(estimates)


class Products:
    """Inner products from one backward pass, in float64: ``with_noise`` ``(probes, n)``, ``squared_norms`` ``(n,)``."""

    def __init__(self, probes: int, blocks: int) -> None:
        self.with_noise = torch.zeros(probes, blocks, dtype=torch.float64)
        self.squared_norms = torch.zeros(blocks, dtype=torch.float64)


@contextmanager
def gradients(blocks: Sequence[Block], take: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Call ``take`` with the number of each block and its gradient, as it arrives in the backward pass inside.

    Afterwards the gradient is freed: there is never more than one.
    """

    def hook(i: int) -> Callable[[torch.Tensor], None]:
        def taken(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            take(i, parameter.grad)
            parameter.grad = None

        return taken

    handles = [block.parameter.register_post_accumulate_grad_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def products(
    blocks: Sequence[Block], directions: Sequence[NoiseDirection], then: Callable[[int], None] | None = None
) -> Iterator[Products]:
    """Collect ``<grad_i, z_i>`` and ``|grad_i|^2`` of the backward pass run inside, as each gradient arrives.

    Args:
        blocks: the blocks; one that the loss does not depend on gets zeros.
        directions: of one probe each, without scales, so that their pieces are ``z``.
        then: called with the number of a block while its gradient is still there; a teacher steps here. Afterwards the
            gradient is freed. One backward pass only.
    """
    if any(direction.scales for direction in directions):
        raise ValueError("the inner products are with z: give directions without scales")
    found = Products(len(directions), len(blocks))
    of_blocks: dict[int, torch.Tensor] = {}  # where the gradients were: a GPU is waited for once, at the end

    def take(i: int, gradient: torch.Tensor) -> None:
        flat = gradient.reshape(-1)
        square = torch.linalg.vector_norm(flat).double() ** 2
        of_blocks[i] = torch.stack([square, *(_inner_product(blocks[i], flat, direction) for direction in directions)])
        if then is not None:
            then(i)

    with gradients(blocks, take):
        yield found
    for i, numbers in zip(of_blocks, fetch([numbers[None] for numbers in of_blocks.values()]), strict=True):
        found.squared_norms[i], found.with_noise[:, i] = numbers[0, 0], numbers[0, 1:]


def inner_product(block: Block, flat: torch.Tensor, direction: NoiseDirection) -> float:
    """Return ``<flat, z>`` for a ``flat`` tensor of the size of ``block``: pieces in its dtype, added in float64."""
    return float(_inner_product(block, flat, direction))


def _inner_product(block: Block, flat: torch.Tensor, direction: NoiseDirection) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for lo, hi, z, factor in direction.pieces(block, 0, block.size):
        for numbers, noise in zip(flat[lo:hi].split(_DOT), z.split(_DOT), strict=True):
            total += factor * (numbers * noise.to(flat.dtype)).sum().double()  # pairwise, unlike torch.dot
    return total


@torch.no_grad()
def walk_(blocks: Sequence[Block], direction: NoiseDirection, distance: float) -> None:
    """Move the weights in place by ``distance * u``.

    A walk there and back restores float32 weights within a rounding. Autograd cannot run a backward pass through
    weights that are perturbed on use, since it would keep every temporary.
    """
    for block in blocks:
        theta = block.parameter.detach().view(-1)
        for lo, hi, z, factor in direction.pieces(block, 0, block.size):
            theta[lo:hi].add_(z.to(theta.dtype), alpha=distance * factor)
