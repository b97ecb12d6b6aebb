"""Bound on the gain of static scales over MeZO in one step, each at its best learning rate.

A step of rate ``lr`` along ``u = s z`` changes the loss by ``-lr A + lr^2 D C / 2`` in the mean over noise and batches:

    A = sum s_i^2 n_i           n_i  signal, |E g_i|^2
    D = sum s_i^2 a_i           a_i  n_i + noise / batch size: mean squared gradient of a batch
    C = sum s_i^2 h_i           h_i  trace of the curvature, for cross-entropy about that of the Fisher matrix

(the product of ``D`` and ``C`` leaves out ``2 g' S H S g``, which punishes scales on few directions further). The best
rate is ``A / (D C)``, the gain there ``A^2 / (2 D C)``, whatever the length of ``s``. Writing ``w = s^2``, a point
``(D / A, C / A)`` is in the convex hull of those of the single groups, and a product of two positive coordinates is
least over a polygon at a corner: **no scales gain more than the best single group**, alone. That is the bound.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Groups:
    """Sums over the blocks of each group, ``(groups,)`` float64, and what they are called."""

    names: list[str]
    sizes: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    fisher: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        """Signal over Fisher trace of each group, divided by that of the whole model."""
        return _relative(self.signal, self.fisher)

    def batch_ratio(self, batch_size: int) -> torch.Tensor:
        """The same with a batch's squared gradient for the signal: which a loss on the batch of the probe rewards."""
        return _relative(self.of_batch(batch_size), self.fisher)

    def of_batch(self, batch_size: int) -> torch.Tensor:
        """Mean squared gradient of a batch, ``(groups,)``."""
        return self.signal + self.noise / batch_size


def gain(groups: Groups, weight: torch.Tensor, batch_size: int) -> float:
    """Return the gain of a step with squared scales ``weight``, ``(groups,)``, over MeZO's, each at its best rate.

    >>> two = Groups(["a", "b"], *torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 3.0]]).double())
    >>> gain(two, torch.tensor([1.0, 0.0]).double(), 8)
    4.0
    """
    return _gain(groups, weight, batch_size) / _gain(groups, torch.ones_like(groups.signal), batch_size)


def best_single(groups: Groups, batch_size: int) -> tuple[str, float]:
    """Return the group that gains most alone, and what it gains: no scales of these groups gain more."""
    alone = [gain(groups, one, batch_size) for one in torch.eye(len(groups.names), dtype=torch.float64)]
    best = max(range(len(alone)), key=alone.__getitem__)
    return groups.names[best], alone[best]


def best_rate(groups: Groups, batch_size: int) -> float:
    """Return MeZO's learning rate of the largest gain."""
    return float(groups.signal.sum() / (groups.of_batch(batch_size).sum() * groups.fisher.sum()))


def _gain(groups: Groups, weight: torch.Tensor, batch_size: int) -> float:
    a = weight @ groups.signal
    d = weight @ groups.of_batch(batch_size)
    return float(a.clamp(min=0) ** 2 / (2 * d * (weight @ groups.fisher)))


def _relative(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    return above / below * (below.sum() / above.sum())
