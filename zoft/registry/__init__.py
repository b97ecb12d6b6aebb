"""Tuner cards: what they say, their file, the local store, and which models they fit."""

from zoft.registry.card import Card
from zoft.registry.schema import TunerCard

__all__ = ["Card", "TunerCard"]
