"""Tuner cards: what they say, their file, the local store, and which models they fit."""

from zoft.registry.card.card import Card
from zoft.registry.card.networks import first_scales, pack, unpack
from zoft.registry.card.samples import sample_weights
from zoft.registry.card.schema import TunerCard
from zoft.registry.hub.client import HubName, UnreachableError
from zoft.registry.hub.pull import pull
from zoft.registry.hub.push import Pushed, push, write_folder
from zoft.registry.match.candidates import Candidate, Found, Subject, candidates, choose
from zoft.registry.match.discover import discover, search
from zoft.registry.match.loading import Tuner, find, fit, load, locate, open_card
from zoft.registry.stores.local import Store
from zoft.registry.stores.remote import RemoteStore, open_store
from zoft.registry.stores.store import Entry, Shelf

__all__ = [
    "Candidate",
    "Card",
    "Entry",
    "Found",
    "HubName",
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
