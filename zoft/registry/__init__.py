"""Tuner cards: what they say, their file, the local store, and which models they fit."""

from zoft.registry.candidates import Candidate, Subject, candidates, choose
from zoft.registry.card import Card
from zoft.registry.client import HubName, UnreachableError
from zoft.registry.hub import pull
from zoft.registry.loading import Tuner, find, fit, load, open_card
from zoft.registry.matching import Match, match
from zoft.registry.networks import first_scales, pack, unpack
from zoft.registry.publish import Pushed, push, write_folder
from zoft.registry.samples import sample_weights
from zoft.registry.schema import TunerCard
from zoft.registry.store import Entry, Store

__all__ = [
    "Candidate",
    "Card",
    "Entry",
    "HubName",
    "Match",
    "Pushed",
    "Store",
    "Subject",
    "Tuner",
    "TunerCard",
    "UnreachableError",
    "candidates",
    "choose",
    "find",
    "first_scales",
    "fit",
    "load",
    "match",
    "open_card",
    "pack",
    "pull",
    "push",
    "sample_weights",
    "unpack",
    "write_folder",
]
