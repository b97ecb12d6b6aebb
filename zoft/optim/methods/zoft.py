"""ZO Fine-tuner: MeZO along directions whose blocks are scaled by a learned, frozen tuner (arXiv 2510.00419)."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch

from zoft.errors import ConfigError, DivergedError, ModelError
from zoft.optim.core.groups import Parameters
from zoft.optim.core.oracle import Closure
from zoft.optim.core.record import Record, StepRecord
from zoft.optim.methods.mezo import MeZO
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import full_sizes, normaliser
from zoft.weights.blocks import statistics

REFRESH = 16


class HasNetworks(Protocol):
    """A tuner that carries its networks, as `zoft.registry.load` gives it."""

    @property
    def networks(self) -> PertNN:
        """The networks, cut to the blocks of a model."""


class ZOFineTuner(MeZO):
    """``u = s z`` with ``s`` from `PertNN`; ``theta <- theta - lr * slope * u``, two forward passes a probe.

    The scales are computed from the weights and the losses of the step before, normalised so that the learning rate
    keeps the meaning it has for MeZO, and go into the record: replaying needs no tuner. With an untrained default tuner
    every scale is exactly 1 and the steps are MeZO's, bit for bit. Networks that hand on the raw ``sigma = s / k``
    put ``k`` into the record, so that a run that goes on reads the same.

    Args:
        params: as for `ZOOptimizer`.
        tuner: the networks, or what `zoft.registry.load` gave. Blocks of the model that it does not know have
            ``sigma = 1``; each of its own blocks must be in the model.
        sizes: returns the effective sizes of the blocks in the coming step, ``(n,)``; default: their numbers of
            weights. Networks that were learned with touched rows ask for it (`zoft.tuner.normalisation.touched_sizes`).
        refresh: steps between two readings of the weights' mean and variance. A reading takes about a tenth of a step
            on a CPU, and in so few steps of a small learning rate the two do not change.
        lr, eps, probes, weight_decay, seed, master_weights, journal: as for `ZOOptimizer`.

    Raises:
        DivergedError: in a step, where the tuner gives a scale that is not finite.

    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = ZOFineTuner(model, PertNN(["weight", "bias"]), lr=0.1, eps=1e-3)
    >>> losses = [optimizer.step(lambda: model(torch.ones(4)).square().sum()) for _ in range(50)]
    >>> losses[-1] < losses[0] / 2
    True
    """

    def __init__(
        self,
        params: Parameters,
        tuner: PertNN | HasNetworks,
        *,
        sizes: Callable[[], torch.Tensor | None] | None = None,
        refresh: int = REFRESH,
        journal: Callable[[Record], None] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params, journal=journal, **settings)
        if refresh < 1:
            raise ConfigError(f"refresh is {refresh}: expected at least 1 step")
        networks = tuner if isinstance(tuner, PertNN) else tuner.networks
        self.tuner = networks.requires_grad_(False)
        if networks.effective_size == "touched_rows" and sizes is None:
            raise ConfigError(
                "this tuner counts the embedding by the rows that a batch touches: give sizes=, a function that "
                "returns zoft.tuner.normalisation.touched_sizes of the batch"
            )
        whole = None if networks.effective_size == "none" else full_sizes(self.blocks)
        self._sizes = sizes or (lambda: whole)
        self._known = self._positions(networks)
        self._known_blocks = [self.blocks[i] for i in self._known.tolist()]
        self._refresh, self._k = refresh, 1.0

    def forget(self) -> None:
        """As `ZOOptimizer.forget`; losses and scales of the step before are those of the start, too."""
        super().forget()
        self._read_at = -1
        self.param_groups[0]["before"] = _packed(Recurrent.start(len(self.blocks)))

    def _positions(self, networks: PertNN) -> torch.Tensor:
        """Where the blocks of the networks stand among the model's."""
        position = {block.name: i for i, block in enumerate(self.blocks)}
        if absent := [name for name in networks.names if name not in position]:
            raise ModelError(
                f"the tuner has a network for {absent[0]!r} (and {len(absent) - 1} other blocks) that the model lacks; "
                "match the tuner to the model first"
            )
        return torch.tensor([position[name] for name in networks.names])

    def measure(self, closure: Closure) -> StepRecord:
        """As `ZOOptimizer.measure`; the record has ``k``, too, where the next step reads the raw scale."""
        record = super().measure(closure)
        return replace(record, extra={**record.extra, "k": self._k}) if self.tuner.recurrent == "sigma" else record

    def apply(self, record: Record) -> None:
        """As `ZOOptimizer.apply`; a replayed step reads mean and variance where the live one did."""
        if isinstance(record, StepRecord):
            self._read_statistics(record.step)
        super().apply(record)

    def _read_statistics(self, step: int) -> None:
        """Read mean and variance of the weights if it is time to; as optimizer state they are part of a snapshot."""
        known = self._known_blocks
        absent = any("statistics" not in self.state[block.parameter] for block in known)
        if absent or (step % self._refresh == 0 and step != self._read_at):
            facts = self.scratch["facts"] = statistics(known)
            for block, row in zip(known, facts, strict=True):
                self.state[block.parameter]["statistics"] = row.clone()
            self._read_at = step

    def _scales(self) -> tuple[float, ...]:
        self._read_statistics(self.param_groups[0]["step"])
        if "facts" not in self.scratch:  # a snapshot was loaded, which leaves the state on the model's device
            of_blocks = [self.state[block.parameter]["statistics"].cpu() for block in self._known_blocks]
            self.scratch["facts"] = torch.stack(of_blocks)
        before = _unpacked(self.param_groups[0]["before"])
        known = Recurrent(before.loss_pos, before.loss_neg, before.scales[self._known])
        sigma = torch.ones(len(self.blocks), dtype=torch.float64)
        sigma[self._known] = self.tuner(self.scratch["facts"], known).double()
        k = normaliser(sigma, self._sizes())
        self._k = float(k)
        # Rounded to float32 before they are used: what a journal stores is what was applied.
        scales = tuple((k * sigma).float().tolist())
        self._check_finite(sigma.tolist(), scales)
        return scales

    def _check_finite(self, sigma: list[float], scales: tuple[float, ...]) -> None:
        for numbers in (sigma, scales):
            for block, value in zip(self.blocks, numbers, strict=True):
                if not math.isfinite(value):
                    raise DivergedError(
                        f"step {self.param_groups[0]['step']}: the tuner gives block {block.name!r} the scale {value}, "
                        "expected a finite one; the weights have diverged (try a lower --lr) or the card does not fit "
                        "them (try --method mezo)"
                    )

    def observe(self, record: Record) -> None:
        """Take over what the step after ``record`` reads of it; a skipped step leaves the state as it was."""
        super().observe(record)
        if not isinstance(record, StepRecord) or record.skipped or record.scales is None:
            return
        count = len(record.losses)
        loss_pos, loss_neg = (sum(pair[side] for pair in record.losses) / count for side in (0, 1))
        k = record.numbers("k")[0] if "k" in record.extra else 1.0
        scales = torch.tensor(record.scales, dtype=torch.float64) / k
        self.param_groups[0]["before"] = _packed(Recurrent(loss_pos, loss_neg, scales))


def _packed(state: Recurrent) -> tuple[float, float, list[float]]:
    """A `Recurrent` as plain numbers, which ``state_dict`` carries."""
    return state.loss_pos, state.loss_neg, state.scales.tolist()


def _unpacked(state: tuple[float, float, list[float]]) -> Recurrent:
    loss_pos, loss_neg, scales = state
    return Recurrent(loss_pos, loss_neg, torch.tensor(scales, dtype=torch.float64))
