"""Controls that a learned tuner has to beat: scales made without learning, as networks that can drive a run."""

from collections.abc import Callable, Iterable, Sequence

import torch

from zoft.metatrain.gradient import products
from zoft.tuner.networks import Level, PertNN
from zoft.tuner.normalisation import full_sizes, normalise
from zoft.weights.blocks import Block

EXPONENT = 0.25  # of the energy; with 0.5 the scales are too far apart to train with


def gradient_energy(blocks: Sequence[Block], closures: Iterable[Callable[[], torch.Tensor]]) -> torch.Tensor:
    """Return the mean squared gradient per weight of every block, ``(n,)``, over the batches of ``closures``.

    Gradients are those of single batches, noise included: three forwards a batch.
    """
    total = torch.zeros(len(blocks), dtype=torch.float64)
    count = 0
    for closure in closures:
        with products(blocks, []) as found:
            closure().backward()
        total += found.squared_norms
        count += 1
    return total / (count * full_sizes(blocks))


def energy_scales(energy: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return ``energy ** 0.25``, ``(n,)``, normalised.

    A block without any gradient gets the smallest scale of the others.

    >>> energy_scales(torch.tensor([16.0, 1.0, 0.0]), torch.ones(3))[:2].tolist()  # doctest: +ELLIPSIS
    [1.414..., 0.707...]
    """
    positive = energy[energy > 0]
    sigma = energy.clamp(min=float(positive.min()) if len(positive) else 1.0) ** EXPONENT
    return normalise(sigma, sizes)


def energy_tuner(blocks: Sequence[Block], energy: torch.Tensor) -> PertNN:
    """The gradient-energy control: fixed scales from ``energy``, of `gradient_energy`."""
    return PertNN.fixed([block.name for block in blocks], energy_scales(energy, full_sizes(blocks)))


def random_tuner(blocks: Sequence[Block], seed: int) -> PertNN:
    """The untrained network of the published form, whose scales are as far apart as in the authors' tuners."""
    return PertNN.paper([block.name for block in blocks], seed)


def warm_start_(tuner: PertNN, sigma: torch.Tensor) -> None:
    """Start ``tuner`` at ``sigma``, ``(n,)``, pooled: its first level gives the geometric mean of each group.

    Differences between single blocks are left to be learned: on data of one task they are mostly noise.
    """
    level = tuner.levels[0]
    assert isinstance(level, Level)
    with torch.no_grad():
        for g in range(len(level.groups)):
            level.b2[g] = sigma[level.index == g].log().mean()
