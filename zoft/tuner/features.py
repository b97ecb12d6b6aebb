"""The inputs of a PertNN: mean and variance of its block, both losses and the scale of the step before."""

from dataclasses import dataclass
from typing import Literal

import torch

Inputs = Literal["scaled", "raw"]

INPUTS = 5


@dataclass(frozen=True)
class Recurrent:
    """Recurrent state between steps: mean losses ``L+`` and ``L-``, and the scale of every block, ``(n,)``.

    The scale is ``s``, or the raw ``sigma`` in the form `paper`. At the start the losses are 0 and the scales 1.
    """

    loss_pos: float
    loss_neg: float
    scales: torch.Tensor

    @classmethod
    def start(cls, blocks: int) -> "Recurrent":
        """Return the state before the first step, and after a reset."""
        return cls(0.0, 0.0, torch.ones(blocks, dtype=torch.float64))


def inputs_raw(statistics: torch.Tensor, before: Recurrent) -> torch.Tensor:
    """Return the inputs of the published code, ``(n, 5)`` float32: mean, variance, both losses, previous scale."""
    losses = statistics.new_tensor([before.loss_pos, before.loss_neg]).expand(len(statistics), 2)
    return torch.cat([statistics, losses, before.scales[:, None]], dim=1).float()


def inputs_scaled(statistics: torch.Tensor, before: Recurrent) -> torch.Tensor:
    """Return the same five inputs scaled to order one, ``(n, 5)`` float32.

    Mean over root mean square; decades of the variance (from 1e-4 to 1 they go from 0 to 1); the mean of the two losses
    and their difference, which in the raw inputs is only in the last digits; the logarithm of the previous scale.
    """
    mean, variance = statistics.unbind(1)
    loss = statistics.new_tensor((before.loss_pos + before.loss_neg) / 2).asinh()
    difference = statistics.new_tensor(100 * (before.loss_pos - before.loss_neg)).asinh()
    columns = [
        mean / (variance + mean.square() + 1e-12).sqrt(),
        1 + (variance + 1e-12).log10() / 4,
        loss.expand_as(mean),
        difference.expand_as(mean),
        before.scales.clamp(min=1e-6).log(),
    ]
    return torch.stack(columns, dim=1).float()
