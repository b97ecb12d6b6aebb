"""The cards that are shipped with zoft: ``tuners/`` of the repository, part of the installed package."""

from pathlib import Path

import zoft
from zoft.registry.card.file import Card
from zoft.registry.stores.store import SUFFIX, Found

PLACE = "shipped with zoft"


def shipped_cards() -> list[Found]:
    """Return the cards shipped with zoft, by file name; read-only, they need neither a store nor the Hub."""
    files = sorted(folder().glob(f"*{SUFFIX}"))
    return [Found(card, card.digest, PLACE) for card in map(Card.load, files)]


def folder() -> Path:
    """Return their folder: in the installed package, or beside the package in a clone."""
    package = Path(zoft.__file__).parent
    installed = package / "tuners"
    return installed if installed.is_dir() else package.parent / "tuners"
