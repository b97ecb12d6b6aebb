"""Tuner cards: their file, where they are stored and published, and which models they fit."""

from zoft.registry.card.base import Base
from zoft.registry.card.evidence import Evidence, mean
from zoft.registry.card.file import MAX_BYTES, Card, tensor_shapes
from zoft.registry.card.networks import first_scales, pack, unpack
from zoft.registry.card.picture import draw_png, draw_text
from zoft.registry.card.samples import sample_positions, sample_weights
from zoft.registry.card.schema import (
    BaseFile,
    BaseSpec,
    BlockSpec,
    EvidenceRow,
    LevelSpec,
    NetworkSpec,
    Recommended,
    TrainableSpec,
    TrainingSpec,
    TunerCard,
    rate_for,
)
from zoft.registry.hub.client import HubName, UnreachableError
from zoft.registry.hub.models import declared_bases, downloaded
from zoft.registry.hub.pull import pull
from zoft.registry.hub.push import Pushed, push, write_folder
from zoft.registry.match.candidates import Candidate, evidence_gain
from zoft.registry.match.discover import discover, search
from zoft.registry.match.identity import ModelIdentity
from zoft.registry.match.lineage import lineage
from zoft.registry.match.loading import AUTO, Tuner, find_card, find_tuner, load, make_tuner, open_card
from zoft.registry.match.matching import Match, verify_base
from zoft.registry.released.archive import read_released
from zoft.registry.released.convert import import_tuner, save_new
from zoft.registry.stores.local import LocalStore
from zoft.registry.stores.remote import RemoteStore, open_store
from zoft.registry.stores.store import CardStore, Entry, Found, how_to_remove

__all__ = [
    "AUTO",
    "MAX_BYTES",
    "Base",
    "BaseFile",
    "BaseSpec",
    "BlockSpec",
    "Candidate",
    "Card",
    "CardStore",
    "Entry",
    "Evidence",
    "EvidenceRow",
    "Found",
    "HubName",
    "LevelSpec",
    "LocalStore",
    "Match",
    "ModelIdentity",
    "NetworkSpec",
    "Pushed",
    "Recommended",
    "RemoteStore",
    "TrainableSpec",
    "TrainingSpec",
    "Tuner",
    "TunerCard",
    "UnreachableError",
    "declared_bases",
    "discover",
    "downloaded",
    "draw_png",
    "draw_text",
    "evidence_gain",
    "find_card",
    "find_tuner",
    "first_scales",
    "how_to_remove",
    "import_tuner",
    "lineage",
    "load",
    "make_tuner",
    "mean",
    "open_card",
    "open_store",
    "pack",
    "pull",
    "push",
    "rate_for",
    "read_released",
    "sample_positions",
    "sample_weights",
    "save_new",
    "search",
    "tensor_shapes",
    "unpack",
    "verify_base",
    "write_folder",
]
