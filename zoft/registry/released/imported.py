"""From a tuner that the authors of ZO Fine-tuner released to a card."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from zoft.errors import CardError, shown
from zoft.registry.card.base import Base
from zoft.registry.card.card import MAX_BYTES, Card, first_error
from zoft.registry.card.schema import BlockSpec, LevelSpec, NetworkSpec, TrainingSpec, TunerCard
from zoft.registry.released.released import HIDDEN, Network, read_released
from zoft.tuner.features import INPUTS
from zoft.tuner.networks import Granularity, group_of

# PyTorch draws the weights of a Linear layer from +-1 / sqrt(inputs).
_BOUNDS = {"w1": INPUTS**-0.5, "b1": INPUTS**-0.5, "w2": HIDDEN**-0.5, "b2": HIDDEN**-0.5}
_SHOWN = 3


def import_tuner(file: str | Path, base: str) -> tuple[Card, list[str]]:
    """Return the card of a released tuner, a ``.pth`` file, for the model ``base``, and what there is to say about it.

    The networks keep their dtype while the card stays under 2 MB, else they are rounded to float16; blocks that are
    too many for that share one network a layer, that of the layer's largest block.

    Args:
        file: a pickled dictionary of block name -> network; see `zoft.registry.released`. Nothing in it is run.
        base: folder, ``.gguf`` file or Hub id. Of a folder without weights, and of a Hub model whose weights are not
            here, only the configuration is read: the card then knows the base's architecture, not its hash.

    Raises:
        CardError: the file is none, would run something, or has other blocks than the base.
        ModelError: there is no such base.

    >>> card, notes = import_tuner("llama1b.pth", "meta-llama/Llama-3.2-1B")  # doctest: +SKIP
    >>> card.metadata.network.activation  # doctest: +SKIP
    'abs'
    """
    path = Path(file).expanduser()
    networks = read_released(path)
    found = Base.find(base)
    _check_blocks(networks, found, base)
    notes = [] if found.spec.hash else [f"{base} is known by its configuration alone: no base hash, no statistics"]
    stored = next(iter(networks.values()))["w1"].dtype
    plans: list[tuple[Granularity, torch.dtype, str]] = [
        ("block", stored, ""),
        ("block", torch.float16, "rounded to float16, or the card would have 2 MB"),
        ("layer", torch.float16, "a network a layer, that of its largest block: a network a block would have 2 MB"),
    ]
    for granularity, dtype, note in plans:
        card = _card(path, networks, found, granularity, dtype)
        if card is not None:
            return card, notes + ([note] if note else [])
    raise CardError(f"{path}: {len(networks)} networks make no card under {MAX_BYTES:,} bytes, even with one a layer")


def save_new(card: Card, path: Path) -> None:
    """Write ``card`` to ``path`` unless something is there: a card is never rewritten in place."""
    if path.exists():
        raise CardError(f"{path} is there already, and a card is never rewritten; choose another --out, or remove it")
    card.save(path)


def beyond_start(network: Network) -> float:
    """Return the largest weight of ``network`` over the bound it was drawn within; at most 1 where none has left it.

    >>> beyond_start({"w2": torch.tensor([0.25, -0.1])})
    2.0
    """
    return max(float(weights.abs().max()) / _BOUNDS[part] for part, weights in network.items())


def _check_blocks(networks: Mapping[str, Network], base: Base, model: str) -> None:
    expected = [block.name for block in base.blocks]
    missing = [name for name in expected if name not in networks]
    extra = [name for name in networks if name not in set(expected)]
    if not missing and not extra:
        return
    parts = []
    if missing:
        parts.append(f"no network for {len(missing)} of its {len(expected)} blocks ({_some(missing)})")
    if extra:
        parts.append(f"{len(extra)} networks for blocks it does not have ({_some(extra)})")
    raise CardError(f"the tuner does not belong to {model}: {'; '.join(parts)}; name the model it was made for: --base")


def _card(
    path: Path, networks: Mapping[str, Network], base: Base, granularity: Granularity, dtype: torch.dtype
) -> Card | None:
    """The card at this ``granularity``; None if it is too large."""
    chosen = _networks_of_groups(networks, base.blocks, granularity)
    stacked = {
        f"level0.{part}": torch.stack([network[part] for network in chosen.values()]).to(dtype) for part in _BOUNDS
    }
    if sum(tensor.nbytes for tensor in [*stacked.values(), *base.tensors.values()]) >= MAX_BYTES:
        return None
    card = Card(_metadata(path, networks, base, granularity, list(chosen)), stacked | base.tensors)
    return card if card.fits else None


def _networks_of_groups(
    networks: Mapping[str, Network], blocks: Sequence[BlockSpec], granularity: Granularity
) -> dict[str, Network]:
    """The network of every group: that of its largest block, which weighs most in what a step does."""
    largest: dict[str, BlockSpec] = {}
    for block in blocks:
        group = group_of(block.name, granularity)
        if group not in largest or block.size > largest[group].size:
            largest[group] = block
    return {group: networks[block.name] for group, block in largest.items()}


def _metadata(
    path: Path, networks: Mapping[str, Network], base: Base, granularity: Granularity, groups: Sequence[str]
) -> TunerCard:
    distances = {block.name: round(beyond_start(networks[block.name]), 3) for block in base.blocks}
    left = sum(distance > 1 for distance in distances.values())
    furthest = max(distances, key=lambda name: distances[name])
    content = path.read_bytes()
    try:
        return TunerCard(
            base=base.spec,
            blocks=base.blocks,
            network=NetworkSpec(
                levels=(LevelSpec(granularity=granularity, groups=tuple(groups)),),
                inputs="raw",
                activation="abs",
                hidden=HIDDEN,
                recurrent="sigma",
                effective_size="touched_rows",  # the authors count an embedding by the tokens of a batch
            ),
            training=TrainingSpec(
                config={
                    "form": "paper",
                    "imported": {"file": path.name[:200], "size": len(content), "sha256": _digest(content)},
                    "largest_over_initial_bound": list(distances.values()),
                }
            ),
            verdict=(
                f"imported, not tested: {left} of {len(distances)} blocks have left the range they were drawn from; "
                f"the furthest, {furthest}, is at {distances[furthest]:g} times its bound"
            ),
            created=datetime.datetime.now(datetime.UTC).date(),
        )
    except ValidationError as error:
        raise CardError(f"{path}: {first_error(error)}") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(shown(name) for name in names[:_SHOWN])
    return listed + (", ..." if len(names) > _SHOWN else "")
