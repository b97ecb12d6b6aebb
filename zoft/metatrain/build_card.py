"""Build the tuner card of a meta-training, and add its evidence."""

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import replace

import zoft
from zoft.metatrain.config import MetatrainConfig
from zoft.noise.table import NOISE_VERSION
from zoft.registry import Base, Card, EvidenceRow, Recommended, TrainingSpec, TunerCard, pack
from zoft.tuner.networks import PertNN

LOCAL = ("model", "data", "out", "device", "device_map")  # settings that have no meaning on another machine
_PACKAGES = ("torch", "transformers")


def make_card(base: Base, tuner: PertNN, config: MetatrainConfig, tasks: Sequence[str], forwards: int) -> Card:
    """Return the card of ``tuner`` with no evidence yet."""
    network, tensors = pack(tuner)
    versions = {"zoft": zoft.__version__, "python": platform.python_version(), "noise": NOISE_VERSION}
    settings = config.stored(without=LOCAL)
    metadata = TunerCard(
        base=base.spec,
        blocks=base.blocks,
        trainable=base.trainable,
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
    return Card(metadata, {**tensors, **base.tensors})


def with_evidence(
    card: Card, rows: Sequence[EvidenceRow], verdict: str, strength: float, lr: float | None, eps: float | None
) -> Card:
    """Return ``card`` at ``strength``, with its evidence, verdict and recommended settings."""
    metadata = card.metadata.model_copy(
        update={
            "network": card.metadata.network.model_copy(update={"strength": strength}),
            "evidence": tuple(rows),
            "verdict": verdict,
            "recommended": Recommended.of(lr, eps),
        }
    )
    return replace(card, metadata=TunerCard.model_validate(metadata.model_dump()))
