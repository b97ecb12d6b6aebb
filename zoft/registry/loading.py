"""From the name of a card to the frozen networks that drive a model."""

from dataclasses import dataclass
from pathlib import Path

import torch

from zoft.errors import CardError, ModelError
from zoft.pertnn import PertNN
from zoft.registry.candidates import Subject, candidates, choose
from zoft.registry.card import Card
from zoft.registry.matching import Match
from zoft.registry.networks import unpack
from zoft.registry.schema import TunerCard
from zoft.registry.store import SHORTEST_PREFIX, Store
from zoft.sources import resolve

AUTO = "auto"


@dataclass(frozen=True)
class Tuner:
    """A card's networks, frozen and cut to the blocks of a model, with how the card fits it."""

    networks: PertNN
    card: Card
    match: Match

    @property
    def metadata(self) -> TunerCard:
        """What the card says."""
        return self.card.metadata

    @property
    def digest(self) -> str:
        """Digest of the card."""
        return self.card.digest


def load(
    source: str | Path,
    model: torch.nn.Module,
    *,
    folder: str | Path | None = None,
    force: bool = False,
    store: Store | None = None,
) -> Tuner:
    """Return the networks of a card for ``model``, checked and matched.

    Args:
        source: a card's file, the first characters of its digest in the store, or ``"auto"``: the store's card that
            fits best.
        model: loaded and not yet trained; its trainable parameters are the blocks.
        folder: where the model was loaded from (folder, Hub id or ``.gguf`` file); default: what the model says
            itself (``model.name_or_path``).
        force: take a card of the same architecture that was made for other weights.
        store: the store to look in; default: the local one.

    Raises:
        CardError: no such card, a damaged one, or one that does not fit.

    >>> tuner = load("auto", model)  # doctest: +SKIP
    >>> optimizer = zoft.optim.ZOFineTuner(model, tuner, lr=1e-6, eps=1e-3)  # doctest: +SKIP
    """
    store = store or Store()
    subject = Subject.of(model, resolve(folder or _origin(model)).path)
    if source == AUTO:
        return fit(choose(store, subject).card, subject)
    return fit(open_card(source, store), subject, force=force)


def find(model: torch.nn.Module, folder: Path, store: Store | None = None) -> Tuner | None:
    """Return the best card of the store that fits ``model``, loaded from ``folder``; None if there is none."""
    store = store or Store()
    if not store.entries():
        return None
    subject = Subject.of(model, folder)
    best = next(iter(candidates(store, subject)), None)
    return fit(best.card, subject) if best is not None and best.match.fits else None


def open_card(source: str | Path, store: Store | None = None) -> Card:
    """Return the card in the file ``source``, or the one in the store whose digest begins so."""
    store = store or Store()
    file = Path(source).expanduser()
    if file.is_file():
        return Card.load(file)
    text = str(source)
    if len(text) >= SHORTEST_PREFIX and not set(text) - set("0123456789abcdef"):
        return store.get(text)
    raise CardError(
        f"{source} is neither a file here nor the beginning of a digest in the store {store.folder} "
        f"({len(store.entries())} cards, see: zoft registry ls); give a card's file (*.tuner.safetensors), a digest "
        "or auto"
    )


def fit(card: Card, subject: Subject, *, force: bool = False) -> Tuner:
    """Return the networks of ``card`` for the blocks of ``subject`` that it knows; `CardError` unless it fits."""
    match = subject.match(card)
    match.require(force=force)
    pairs = zip(subject.blocks, match.mapping.rows, strict=True)
    return Tuner(unpack(card, [block.name for block, row in pairs if row is not None]), card, match)


def _origin(model: torch.nn.Module) -> str:
    """Where transformers loaded ``model`` from, as the model remembers."""
    name = getattr(model, "name_or_path", "")
    if not (isinstance(name, str) and name):
        raise ModelError("the model does not say where it was loaded from; name it with folder=")
    return name
