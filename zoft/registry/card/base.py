"""What a card keeps of its base model: taken from the weights, or from the configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zoft.model import fingerprint
from zoft.model.adapters import adapter_of
from zoft.model.checkpoint import INDEX_FILE, SINGLE_FILE, weight_files
from zoft.model.load import Loaded, load, meta_model, read_config
from zoft.registry.card.samples import sample_weights
from zoft.registry.card.schema import ALL_WEIGHTS, BaseFile, BaseSpec, BlockSpec, TrainableSpec
from zoft.registry.hub.client import HubName
from zoft.registry.hub.published import config_folder, downloaded
from zoft.weights.blocks import Block, architecture_hash, statistics, trainable_blocks


@dataclass(frozen=True)
class Base:
    """A base as a card has it; ``tensors`` are its ``base.statistics`` and ``base.samples``, none without weights.

    With an adapter, blocks and tensors are of the adapter at its start, and ``trainable`` says what it is.
    """

    spec: BaseSpec
    blocks: tuple[BlockSpec, ...]
    tensors: dict[str, torch.Tensor]
    trainable: TrainableSpec = ALL_WEIGHTS

    @classmethod
    def of(cls, loaded: Loaded, blocks: Sequence[Block]) -> "Base":
        """Describe the model as it was loaded."""
        found = fingerprint.describe_files(weight_files(loaded.path))
        adapter = adapter_of(loaded.model)
        spec = BaseSpec(
            id=_line(loaded.base),
            hash=fingerprint.base_hash(loaded.path),
            architecture_hash=architecture_hash(blocks)
            if adapter is None
            else fingerprint.architecture_of(loaded.path),
            files=tuple(BaseFile(name=file.name, size=file.size, sha256=file.sha256) for file in found),
            source_note="converted from a GGUF file" if loaded.base.endswith(".gguf") else "",
        )
        measured = {"base.statistics": statistics(blocks).float(), "base.samples": sample_weights(blocks)}
        return cls(spec, _named(blocks), measured, TrainableSpec.of(adapter))

    @classmethod
    def find(cls, model: str) -> "Base":
        """Describe ``model``: a folder, a ``.gguf`` file or a Hub id.

        Of a folder that holds no weights, and of a Hub model whose weights are not on this machine, the configuration
        is read and nothing else; the base hash is None then.
        """
        folder = _without_weights(model)
        if folder is None:
            loaded = load(model, device="cpu")
            return cls.of(loaded, trainable_blocks(loaded.model))
        blocks = trainable_blocks(meta_model(read_config(folder)))
        spec = BaseSpec(
            id=_line(model),
            hash=None,
            architecture_hash=architecture_hash(blocks),
            source_note="known by its configuration alone",
        )
        return cls(spec, _named(blocks), {})


def _without_weights(model: str) -> Path | None:
    """The folder of the configuration of ``model`` where that is all there is of it here."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return None if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)) else folder
    if downloaded(model):
        return None
    return config_folder(HubName.parse(model))


def _named(blocks: Sequence[Block]) -> tuple[BlockSpec, ...]:
    return tuple(BlockSpec(name=block.name, shape=block.shape) for block in blocks)


def _line(source: str) -> str:
    """A model as its card may name it: a Hub id as it is, of a path only the last part."""
    is_hub_id = source.count("/") <= 1 and not source.startswith((".", "/", "~"))
    return source if is_hub_id else source.rstrip("/").rsplit("/", 1)[-1]
