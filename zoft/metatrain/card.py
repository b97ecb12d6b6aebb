"""From what was learned to a tuner card, and on to another strength or with its evidence."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

import zoft
from zoft import fingerprint, models
from zoft.blocks import Block, architecture_hash, statistics
from zoft.checkpoint import weight_files
from zoft.metatrain.config import MetatrainConfig
from zoft.noise import NOISE_VERSION
from zoft.pertnn import PertNN
from zoft.registry import Card, TunerCard, pack, sample_weights
from zoft.registry.schema import BaseFile, BaseSpec, BlockSpec, EvidenceRow, Recommended, TrainingSpec

_PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Base:
    """What a card keeps of its base, taken before the first teacher step; tensors as `zoft.registry.card` has them."""

    spec: BaseSpec
    blocks: tuple[BlockSpec, ...]
    statistics: torch.Tensor
    samples: torch.Tensor

    @classmethod
    def of(cls, loaded: models.Loaded, blocks: Sequence[Block]) -> "Base":
        """Describe the model as it was loaded."""
        found = fingerprint.describe_files(weight_files(loaded.path))
        spec = BaseSpec(
            id=_line(loaded.source),
            hash=fingerprint.base_hash(loaded.path),
            architecture_hash=architecture_hash(blocks),
            files=tuple(BaseFile(name=file.name, size=file.size, sha256=file.sha256) for file in found),
            source_note="converted from a GGUF file" if loaded.source.endswith(".gguf") else "",
        )
        named = tuple(BlockSpec(name=block.name, shape=block.shape) for block in blocks)
        return cls(spec, named, statistics(blocks).float(), sample_weights(blocks))


def make_card(base: Base, tuner: PertNN, config: MetatrainConfig, tasks: Sequence[str], forwards: int) -> Card:
    """Return the card of ``tuner`` with no evidence yet."""
    network, tensors = pack(tuner)
    versions = {"zoft": zoft.__version__, "python": platform.python_version(), "noise": NOISE_VERSION}
    settings = config.model_dump(mode="json", exclude={"model", "data", "out", "device"})  # paths say nothing elsewhere
    metadata = TunerCard(
        base=base.spec,
        blocks=base.blocks,
        network=network,
        training=TrainingSpec(
            config=settings,
            tasks=tuple(tasks),
            seeds=(config.seed,),
            steps=config.steps,
            forwards=forwards,
            versions=versions | {name: importlib.metadata.version(name) for name in _PACKAGES},
        ),
        created=datetime.datetime.now(datetime.UTC).date(),
    )
    return Card(metadata, {**tensors, "base.statistics": base.statistics, "base.samples": base.samples})


def with_evidence(
    card: Card, rows: Sequence[EvidenceRow], verdict: str, strength: float, lr: float | None, eps: float | None
) -> Card:
    """Return ``card`` at ``strength``, with what was found out about it."""
    metadata = card.metadata.model_copy(
        update={
            "network": card.metadata.network.model_copy(update={"strength": strength}),
            "evidence": tuple(rows),
            "verdict": verdict,
            "recommended": Recommended(lr=lr, eps=eps),
        }
    )
    return replace(card, metadata=TunerCard.model_validate(metadata.model_dump()))


def _line(source: str) -> str:
    """A model as its card may name it: a Hub id as it is, of a path only the last part."""
    is_hub_id = source.count("/") <= 1 and not source.startswith((".", "/", "~"))
    return source if is_hub_id else source.rstrip("/").rsplit("/", 1)[-1]
