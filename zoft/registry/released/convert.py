"""Convert a tuner that the authors of ZO Fine-tuner released to a card."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError

from zoft.errors import CardError, shown
from zoft.model.checkpoint import INDEX_FILE, SINGLE_FILE
from zoft.model.config import meta_model, read_config
from zoft.model.load import load
from zoft.registry.card.base import Base, base_name, block_specs
from zoft.registry.card.file import MAX_BYTES, Card, first_error
from zoft.registry.card.schema import BaseSpec, BlockSpec, LevelSpec, NetworkSpec, TrainingSpec, TunerCard
from zoft.registry.hub.client import HubName
from zoft.registry.hub.models import config_folder, downloaded
from zoft.registry.released.archive import HIDDEN, Network, read_released
from zoft.tuner.features import INPUTS
from zoft.tuner.networks import Granularity, group_of
from zoft.weights.blocks import architecture_hash, trainable_blocks

# PyTorch draws the weights of a Linear layer from +-1 / sqrt(inputs).
_BOUNDS = {"w1": INPUTS**-0.5, "b1": INPUTS**-0.5, "w2": HIDDEN**-0.5, "b2": HIDDEN**-0.5}
_SHOWN = 3


def import_tuner(file: str | Path, base: str) -> tuple[Card, list[str]]:
    """Return the card of a released tuner, a ``.pth`` file, for the model ``base``, and notes for the user.

    The networks keep their dtype if the card stays under 2 MB, else they are rounded to float16; if that is not
    enough, the blocks of a layer share one network, that of the layer's largest block.

    Args:
        file: a pickled dictionary of block name -> network; see `zoft.registry.released.archive`. Nothing in it is run.
        base: folder, ``.gguf`` file or Hub id. For a folder without weights, and a Hub model whose weights are
            not on this machine, only the configuration is read: the card has the base's architecture, not its hash.

    Raises:
        CardError: the file is not a tuner, would run code, or has other blocks than the base.
        ModelError: there is no such base.

    >>> card, notes = import_tuner("llama1b.pth", "meta-llama/Llama-3.2-1B")  # doctest: +SKIP
    >>> card.metadata.network.activation  # doctest: +SKIP
    'abs'
    """
    path = Path(file).expanduser()
    networks = read_released(path)
    found = find_base(base)
    _check_blocks(networks, found, base)
    notes = [] if found.spec.hash else [f"{base} is known by its configuration alone: no base hash, no statistics"]
    stored = next(iter(networks.values()))["w1"].dtype
    plans: list[tuple[Granularity, torch.dtype, str]] = [
        ("block", stored, ""),
        ("block", torch.float16, "rounded to float16, or the card would have 2 MB"),
        ("layer", torch.float16, "one network per layer, that of its largest block: one per block would have 2 MB"),
    ]
    for granularity, dtype, note in plans:
        card = _fitting_card(path, networks, found, granularity, dtype)
        if card is not None:
            return card, notes + ([note] if note else [])
    raise CardError(
        f"{path}: {len(networks)} networks need a card of {MAX_BYTES:,} bytes or more, even with one per layer"
    )


def save_new(card: Card, path: Path) -> None:
    """Write ``card`` to ``path``; `CardError` if the file exists: a card is never rewritten in place."""
    if path.exists():
        raise CardError(f"{path} exists already, and a card is never rewritten; choose another --out, or remove it")
    card.save(path)


def beyond_start(network: Network) -> float:
    """Return the largest weight of ``network`` over the bound of its initialisation; at most 1 if none has exceeded it.

    >>> beyond_start({"w2": torch.tensor([0.25, -0.1])})
    2.0
    """
    return max(float(weights.abs().max()) / _BOUNDS[part] for part, weights in network.items())


def find_base(model: str) -> Base:
    """Describe ``model``: a folder, a ``.gguf`` file or a Hub id.

    For a folder without weights, and a Hub model whose weights are not on this machine, only the configuration is read;
    the base hash is None then.
    """
    folder = _without_weights(model)
    if folder is None:
        loaded = load(model, device="cpu")
        return Base.of(loaded, trainable_blocks(loaded.model))
    blocks = trainable_blocks(meta_model(read_config(folder)))
    spec = BaseSpec(
        id=base_name(model),
        hash=None,
        architecture_hash=architecture_hash(blocks),
        source_note="known by its configuration alone",
    )
    return Base(spec, block_specs(blocks), {})


def _without_weights(model: str) -> Path | None:
    """The folder with the configuration of ``model`` if its weights are not on this machine, else None."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return None if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)) else folder
    if downloaded(model):
        return None
    return config_folder(HubName.parse(model))


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


def _fitting_card(
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
    """The network of every group: that of its largest block, which dominates the group's steps."""
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
