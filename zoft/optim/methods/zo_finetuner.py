"""ZO Fine-tuner: MeZO along directions whose blocks are scaled by a learned, frozen tuner (arXiv 2510.00419)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from pydantic import Field

from zoft.errors import ConfigError, DivergedError, ModelError
from zoft.optim.core.groups import Parameters
from zoft.optim.core.method import Method
from zoft.optim.core.optimizer import ZOOptimizer
from zoft.optim.core.parts import Host, Scales
from zoft.optim.core.record import Number, StepRecord
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import full_sizes, normaliser
from zoft.weights.blocks import Block, statistics

REFRESH = 16


class HasNetworks(Protocol):
    """A tuner that carries its networks, as `zoft.registry.load` gives it."""

    @property
    def networks(self) -> PertNN:
        """The networks, cut to the blocks of a model."""


class LearnedScales(Scales):
    """``s`` of every block from a frozen `PertNN`: a function of the weights and of the step before.

    Normalised so that the learning rate keeps the meaning it has for MeZO. The scales go into the record, so replaying
    needs no tuner. With an untrained default tuner every scale is exactly 1. Where networks read the raw ``sigma =
    s / k`` of the step before, the record has ``k``, too. State: mean and variance of every block.

    Attributes:
        tuner: the networks. Blocks of the model that they do not know have ``sigma = 1``.
        sizes: returns the effective sizes of the blocks in the coming step, ``(n,)``; default: their numbers of
            weights. Networks that were learned with touched rows need it (`zoft.tuner.normalisation.touched_sizes`).
        refresh: steps between two readings of the weights' mean and variance. A reading takes about a tenth of a step
            on a CPU, and in so few steps of a small learning rate the two do not change.
    """

    tuner: PertNN
    sizes: Callable[[], torch.Tensor | None] | None = None
    refresh: int = Field(REFRESH, ge=1)

    def check(self, host: Host) -> None:
        """Raise where the networks do not fit the blocks, or need sizes that were not given."""
        names = {block.name for block in host.blocks}
        if absent := [name for name in self.tuner.names if name not in names]:
            raise ModelError(
                f"the tuner has a network for {absent[0]!r} (and {len(absent) - 1} other blocks) that the model lacks; "
                "match the tuner to the model first"
            )
        if self.tuner.effective_size == "touched_rows" and self.sizes is None:
            raise ConfigError(
                "this tuner counts the embedding by the rows that a batch touches: give sizes=, a function that "
                "returns zoft.tuner.normalisation.touched_sizes of the batch"
            )

    def measure(self, host: Host) -> tuple[tuple[float, ...], Mapping[str, Number]]:
        """Return the scales, and ``k`` where the next step reads the raw ones.

        Raises:
            DivergedError: a scale is not finite.
        """
        self.before(host, host.step_number)
        known = [block.name for block in host.blocks].index
        positions = torch.tensor([known(name) for name in self.tuner.names])
        before = _unpacked(host)
        inputs = Recurrent(before.loss_pos, before.loss_neg, before.scales[positions])
        sigma = torch.ones(len(host.blocks), dtype=torch.float64)
        sigma[positions] = self.tuner(self._facts(host), inputs).double()
        k = normaliser(sigma, self._sizes(host))
        # Rounded to float32 before they are used: what a journal stores is what was applied.
        scales = tuple((k * sigma).float().tolist())
        _check_finite(host, sigma.tolist())
        _check_finite(host, scales)
        return scales, {"k": float(k)} if self.tuner.recurrent == "sigma" else {}

    def before(self, host: Host, step: int) -> None:
        """Read mean and variance of the weights if it is time to; as optimizer state they are part of a snapshot.

        A replayed step reads them where the live one did.
        """
        blocks = self._blocks(host)
        absent = any("statistics" not in host.state_of(block) for block in blocks)
        if absent or (step % self.refresh == 0 and step != host.scratch.get("read at")):
            facts = host.scratch["facts"] = statistics(blocks)
            for block, row in zip(blocks, facts, strict=True):
                host.state_of(block)["statistics"] = row.clone()
            host.scratch["read at"] = step

    def observe(self, host: Host, record: StepRecord) -> None:
        """Store what the step after ``record`` reads of it."""
        if record.scales is None:
            return
        count = len(record.losses)
        loss_pos, loss_neg = (sum(pair[side] for pair in record.losses) / count for side in (0, 1))
        k = record.numbers("k")[0] if "k" in record.extra else 1.0
        scales = torch.tensor(record.scales, dtype=torch.float64) / k
        host.memory["before"] = loss_pos, loss_neg, scales.tolist()

    def _blocks(self, host: Host) -> list[Block]:
        """The blocks that have a network, in the order of the networks."""
        by_name = {block.name: block for block in host.blocks}
        return [by_name[name] for name in self.tuner.names]

    def _facts(self, host: Host) -> torch.Tensor:
        if "facts" not in host.scratch:  # a snapshot was loaded, which leaves the state on the model's device
            of_blocks = [host.state_of(block)["statistics"].cpu() for block in self._blocks(host)]
            host.scratch["facts"] = torch.stack(of_blocks)
        facts: torch.Tensor = host.scratch["facts"]
        return facts

    def _sizes(self, host: Host) -> torch.Tensor | None:
        if self.sizes is not None:
            sizes = self.sizes()
        else:
            sizes = None if self.tuner.effective_size == "none" else full_sizes(host.blocks)
        if sizes is None or len(host.probed) == len(host.blocks):
            return sizes
        probed = {block.name for block in host.probed}  # blocks that no direction perturbs take no part
        return sizes * torch.tensor([block.name in probed for block in host.blocks])


def _check_finite(host: Host, scales: Sequence[float]) -> None:
    for block, value in zip(host.blocks, scales, strict=True):
        if not math.isfinite(value):
            raise DivergedError(
                f"step {host.step_number}: the tuner gives block {block.name!r} the scale {value}, "
                "expected a finite one; the weights have diverged (try a lower --lr) or the card does not fit "
                "them (try --method mezo)"
            )


def _unpacked(host: Host) -> Recurrent:
    """Losses and scales of the step before; plain numbers in memory, which ``state_dict`` carries."""
    if "before" not in host.memory:
        return Recurrent.start(len(host.blocks))
    loss_pos, loss_neg, scales = host.memory["before"]
    return Recurrent(loss_pos, loss_neg, torch.tensor(scales, dtype=torch.float64))


class ZOFineTuner(ZOOptimizer):
    """``u = s z`` with ``s`` from `PertNN`; ``theta <- theta - lr * slope * u``, two forward passes a probe.

    MeZO with `LearnedScales`: with an untrained tuner the steps are MeZO's, bit for bit.

    Args:
        params: as for `ZOOptimizer`.
        tuner: the networks, or what `zoft.registry.load` returned. Each of its blocks must be in the model.
        sizes, refresh: as for `LearnedScales`.
        settings: lr, eps, probes, weight_decay, seed, master_weights, journal and other parts, as for `ZOOptimizer`.

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
        **settings: Any,
    ) -> None:
        networks = tuner if isinstance(tuner, PertNN) else tuner.networks
        scales = LearnedScales(tuner=networks.requires_grad_(False), sizes=sizes, refresh=refresh)
        super().__init__(params, scales=scales, **settings)


METHOD = Method(
    "zoft",
    "MeZO along directions whose blocks a learned tuner scales (--tuner)",
    "arXiv 2510.00419",
    tuned=True,
)
