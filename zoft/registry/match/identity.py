"""ModelIdentity: what is known of a model that cards are matched with."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zoft.model.adapters import adapter_of
from zoft.model.config import meta_model, read_config
from zoft.model.fingerprint import architecture_of, base_hash
from zoft.model.load import load
from zoft.model.sources import hub_id
from zoft.registry.card.samples import sample_weights
from zoft.registry.card.schema import ALL_WEIGHTS, BaseFile, TrainableSpec
from zoft.registry.hub.client import HubName
from zoft.registry.hub.models import config_folder, declared_bases, downloaded, model_info, published_weights
from zoft.registry.match.lineage import lineage
from zoft.weights.blocks import Block, architecture_hash, trainable_blocks


@dataclass(frozen=True)
class ModelIdentity:
    """What matching needs of a model, collected once for all cards.

    Attributes:
        base_hash: of the weights; None for a model that was not downloaded.
        blocks: the trainable blocks; with an adapter, its tensors.
        samples: ``(n, 16)`` weights of the blocks, see `zoft.registry.sample_weights`; None if not downloaded.
        lineage: names and base hashes of its bases, see `zoft.registry.match.lineage`.
        files: the weight files that the Hub publishes for a model that was not downloaded.
        hub_id: its name on the Hub, if it came from there.
        trainable: whether the blocks are the model's own weights or an adapter, and its settings.
        architecture_hash: of the base.
    """

    base_hash: str | None
    blocks: Sequence[Block]
    samples: torch.Tensor | None = None
    lineage: Collection[str] = ()
    files: Collection[BaseFile] = ()
    hub_id: str | None = None
    trainable: TrainableSpec = ALL_WEIGHTS
    architecture_hash: str = ""

    @property
    def publishers(self) -> frozenset[str]:
        """Namespaces on the Hub, in lower case, of the model and of the bases that it declares; no local folders."""
        names = [name for name in (self.hub_id, *self.lineage) if name and not Path(name).expanduser().exists()]
        return frozenset(hub.repo.split("/")[0].casefold() for name in names if (hub := HubName.of(name)))

    @classmethod
    def of(cls, model: torch.nn.Module, folder: Path) -> "ModelIdentity":
        """Describe ``model``, loaded from ``folder`` and not yet trained; its trainable parameters are the blocks."""
        blocks, adapter = trainable_blocks(model), adapter_of(model)
        return cls(
            base_hash(folder),
            blocks,
            sample_weights(blocks),
            lineage(folder),
            hub_id=hub_id(folder),
            trainable=TrainableSpec.of(adapter),
            architecture_hash=architecture_hash(blocks) if adapter is None else architecture_of(folder),
        )

    @classmethod
    def published(cls, model: str) -> "ModelIdentity":
        """Describe the Hub model ``model`` without its weights: by configuration, lineage and SHA-256 of its files.

        Raises `CardError` if the Hub does not have it.
        """
        info, name = model_info(model)
        blocks = trainable_blocks(meta_model(read_config(config_folder(name))))
        return cls(
            base_hash=None,
            blocks=blocks,
            lineage=declared_bases(info),
            files=published_weights(info),
            hub_id=name.repo,
            architecture_hash=architecture_hash(blocks),
        )

    @classmethod
    def find(cls, model: str, *, download: bool = False) -> "ModelIdentity":
        """Describe ``model``: a folder, a ``.gguf`` file or a Hub id, which is downloaded only with ``download``."""
        if not (download or downloaded(model)):
            return cls.published(model)
        loaded = load(model, device="cpu")
        return cls.of(loaded.model, loaded.path)
