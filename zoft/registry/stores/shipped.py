"""The cards that come with zoft: ``tuners/`` of the repository, which is in the package when it is installed."""

from pathlib import Path

import zoft
from zoft.registry.card.card import Card
from zoft.registry.match.candidates import Found
from zoft.registry.stores.store import SUFFIX

PLACE = "shipped with zoft"


def shipped() -> list[Found]:
    """Return the cards that come with zoft, in the order of their names; read only, they need neither store nor Hub."""
    files = sorted(folder().glob(f"*{SUFFIX}"))
    return [Found(card, card.digest, PLACE) for card in map(Card.load, files)]


def folder() -> Path:
    """Where they lie: in the installed package, or beside it in a clone."""
    package = Path(zoft.__file__).parent
    installed = package / "tuners"
    return installed if installed.is_dir() else package.parent / "tuners"
