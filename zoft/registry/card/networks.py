"""PertNNs in a card: pack networks into tensors, unpack them, and compute their first scales."""

from collections.abc import Sequence

import torch

from zoft.errors import CardError
from zoft.registry.card.file import Card
from zoft.registry.card.schema import LevelSpec, NetworkSpec
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import Level, PertNN
from zoft.tuner.normalisation import normalise

_PARTS = ("w1", "b1", "w2", "b2")


def pack(net: PertNN, *, dtype: torch.dtype = torch.float16) -> tuple[NetworkSpec, dict[str, torch.Tensor]]:
    """Return the card's description of ``net``, and its weights in ``dtype`` by their names in a card."""
    levels = _levels(net)
    spec = NetworkSpec(
        levels=tuple(LevelSpec(granularity=level.granularity, groups=tuple(level.groups)) for level in levels),
        inputs=net.inputs,
        activation=net.activation,
        hidden=net.hidden,
        recurrent=net.recurrent,
        effective_size=net.effective_size,
        strength=net.strength,
    )
    tensors = {
        f"level{k}.{part}": getattr(level, part).detach().to("cpu", dtype)
        for k, level in enumerate(levels)
        for part in _PARTS
    }
    return spec, tensors


def unpack(card: Card, names: Sequence[str] | None = None) -> PertNN:
    """Return the networks of ``card`` in float32, frozen, for its blocks called ``names``, in that order.

    The default is all its blocks in the card's order.
    """
    network = card.metadata.network
    net = PertNN(
        [block.name for block in card.metadata.blocks] if names is None else names,
        levels=[level.granularity for level in network.levels],
        inputs=network.inputs,
        activation=network.activation,
        hidden=network.hidden,
        strength=network.strength,
        recurrent=network.recurrent,
        effective_size=network.effective_size,
    )
    with torch.no_grad():
        for k, (level, spec) in enumerate(zip(_levels(net), network.levels, strict=True)):
            rows = [spec.groups.index(group) for group in level.groups]
            for part in _PARTS:
                getattr(level, part).copy_(card.tensors[f"level{k}.{part}"][rows])
    return net.requires_grad_(False).eval()


def first_scales(card: Card) -> torch.Tensor:
    """Return the scales ``s`` of the card's blocks at the first step on the card's base, ``(n,)`` float64."""
    if "base.statistics" not in card.tensors:
        raise CardError(
            f"the card knows the architecture of {card.metadata.base.id}, but not its weights: its scales are unknown"
        )
    blocks = card.metadata.blocks
    net = unpack(card)
    sigma = net(card.tensors["base.statistics"].double(), Recurrent.start(len(blocks)))
    sizes = None if net.effective_size == "none" else torch.tensor([block.size for block in blocks])
    return normalise(sigma, sizes)


def _levels(net: PertNN) -> list[Level]:
    return [level for level in net.levels if isinstance(level, Level)]
