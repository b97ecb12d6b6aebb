"""The cards that are shipped with zoft: ``tuners/`` of the repository, part of the installed package."""

from pathlib import Path

import zoft
from zoft.errors import CardError
from zoft.registry.card.file import Card
from zoft.registry.stores.store import SUFFIX, Found, OnNote, ignore

PLACE = "shipped with zoft"


def shipped_cards(on_note: OnNote = ignore) -> list[Found]:
    """Return the cards shipped with zoft, by file name; one that cannot be read is named to ``on_note``."""
    found = []
    for file in sorted(folder().glob(f"*{SUFFIX}")):
        try:
            card = Card.load(file)
        except CardError as error:
            on_note(f"passed over: {error}")
        else:
            found.append(Found(card, card.digest, PLACE))
    return found


def folder() -> Path:
    """Return their folder: in the installed package, or beside the package in a clone."""
    package = Path(zoft.__file__).parent
    installed = package / "tuners"
    return installed if installed.is_dir() else package.parent / "tuners"
