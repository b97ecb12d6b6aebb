"""Tuner cards: what they say, their file, the local store, and which models they fit."""

from zoft.registry.candidates import Candidate, Found, Subject, candidates, choose
from zoft.registry.card import Card
from zoft.registry.client import HubName, UnreachableError
from zoft.registry.discover import discover, search
from zoft.registry.hub import pull
from zoft.registry.loading import Tuner, find, fit, load, locate, open_card
from zoft.registry.matching import Match, match
from zoft.registry.networks import first_scales, pack, unpack
from zoft.registry.publish import Pushed, push, write_folder
from zoft.registry.remote import RemoteStore, open_store
from zoft.registry.samples import sample_weights
from zoft.registry.schema import TunerCard
from zoft.registry.shelf import Entry, Shelf
from zoft.registry.store import Store

__all__ = [
    "Candidate",
    "Card",
    "Entry",
    "Found",
    "HubName",
    "Match",
    "Pushed",
    "RemoteStore",
    "Shelf",
    "Store",
    "Subject",
    "Tuner",
    "TunerCard",
    "UnreachableError",
    "candidates",
    "choose",
    "discover",
    "find",
    "first_scales",
    "fit",
    "load",
    "locate",
    "match",
    "open_card",
    "open_store",
    "pack",
    "pull",
    "push",
    "sample_weights",
    "search",
    "unpack",
    "write_folder",
]
