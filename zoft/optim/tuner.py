"""ZO Fine-tuner: MeZO along directions whose blocks are scaled by a learned, frozen tuner (arXiv 2510.00419)."""

from collections.abc import Callable
from typing import Any

import torch

from zoft.blocks import statistics
from zoft.errors import ModelError
from zoft.optim.engine import Parameters
from zoft.optim.mezo import MeZO
from zoft.optim.record import StepRecord
from zoft.pertnn import PertNN, Recurrent, normalise


class ZOFineTuner(MeZO):
    """``u = s z`` with ``s`` from `PertNN`; ``theta <- theta - lr * slope * u``, two forward passes a probe.

    The scales are computed from the weights and the losses of the step before, normalised so that the learning rate
    keeps the meaning it has for MeZO, and go into the record: replaying needs no tuner. With an untrained default tuner
    every scale is exactly 1 and the steps are MeZO's, bit for bit.

    Args:
        params: as for `ZOOptimizer`.
        tuner: the networks. Blocks of the model that it does not know have ``sigma = 1``; each of its own blocks must
            be in the model.
        lr, eps, probes, weight_decay, seed, master_weights, journal: as for `ZOOptimizer`.
    """

    def __init__(
        self, params: Parameters, tuner: PertNN, *, journal: Callable[[StepRecord], None] | None = None, **settings: Any
    ) -> None:
        super().__init__(params, journal=journal, **settings)
        self.tuner = tuner.requires_grad_(False)
        names = {block.name: i for i, block in enumerate(self.blocks)}
        if absent := [name for name in tuner.names if name not in names]:
            raise ModelError(
                f"the tuner has a network for {absent[0]!r} (and {len(absent) - 1} other blocks) that the model lacks; "
                "match the tuner to the model first"
            )
        self._known = torch.tensor([names[name] for name in tuner.names])
        self._sizes = torch.tensor([block.size for block in self.blocks], dtype=torch.float64)
        self.param_groups[0]["before"] = _packed(Recurrent.start(len(self.blocks)))

    def _scales(self) -> tuple[float, ...]:
        before = _unpacked(self.param_groups[0]["before"])
        known = Recurrent(before.loss_pos, before.loss_neg, before.scales[self._known])
        sigma = torch.ones(len(self.blocks), dtype=torch.float64)
        sigma[self._known] = self.tuner(statistics([self.blocks[i] for i in self._known]), known).double()
        # Rounded to float32 before they are used: what a journal stores is what was applied.
        return tuple(normalise(sigma, self._sizes).float().tolist())

    def observe(self, record: StepRecord) -> None:
        """Take over what the step after ``record`` reads of it; a skipped step leaves the state as it was."""
        if record.skipped or record.scales is None:
            return
        count = len(record.losses)
        loss_pos, loss_neg = (sum(pair[side] for pair in record.losses) / count for side in (0, 1))
        scales = torch.tensor(record.scales, dtype=torch.float64)
        self.param_groups[0]["before"] = _packed(Recurrent(loss_pos, loss_neg, scales))


def _packed(state: Recurrent) -> tuple[float, float, list[float]]:
    """A `Recurrent` as plain numbers, which ``state_dict`` carries."""
    return state.loss_pos, state.loss_neg, state.scales.tolist()


def _unpacked(state: tuple[float, float, list[float]]) -> Recurrent:
    loss_pos, loss_neg, scales = state
    return Recurrent(loss_pos, loss_neg, torch.tensor(scales, dtype=torch.float64))
