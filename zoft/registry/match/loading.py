"""From the name of a card to the frozen networks that drive a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from zoft.errors import CardError, ModelError
from zoft.model.sources import resolve
from zoft.registry.card.card import Card
from zoft.registry.card.networks import unpack
from zoft.registry.card.schema import TunerCard
from zoft.registry.hub.client import HubName
from zoft.registry.hub.pull import pull
from zoft.registry.match.candidates import Candidate, Found, Subject, best_of, candidates, choose
from zoft.registry.match.discover import PLACES, Tell, discover
from zoft.registry.match.matching import Match
from zoft.registry.stores.local import Store
from zoft.registry.stores.remote import shared_stores
from zoft.registry.stores.shipped import shipped
from zoft.registry.stores.store import Shelf, is_prefix
from zoft.tuner.networks import PertNN

AUTO = "auto"


@dataclass(frozen=True)
class Tuner:
    """A card's networks, frozen and cut to the blocks of a model, with how the card fits it.

    ``source`` names this very card to ``--tuner`` at any later time, ``place`` says to a person where it lay.
    """

    networks: PertNN
    card: Card
    match: Match
    source: str
    place: str

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
    store: Shelf | None = None,
    tell: Tell = lambda message: None,
) -> Tuner:
    """Return the networks of a card for ``model``, checked and matched.

    Args:
        source: a card's file, the first characters of its digest in the store, ``org/name[@revision]`` on the Hub, or
            ``"auto"``: the card that fits best.
        model: loaded and not yet trained; its trainable parameters are the blocks.
        folder: where the model was loaded from (folder, Hub id or ``.gguf`` file); default: what the model says
            itself (``model.name_or_path``).
        force: take a card of the same architecture that was made for other weights.
        store: where ``"auto"`` and digests are looked for; default: here and on the Hub, see
            `zoft.registry.match.discover.discover`.
        tell: told in a sentence if the Hub could not be asked.

    Raises:
        CardError: no such card, a damaged one, or one that does not fit.

    >>> tuner = load("org/base-tuner", model)  # doctest: +SKIP
    >>> optimizer = zoft.optim.ZOFineTuner(model, tuner, lr=1e-6, eps=1e-3)  # doctest: +SKIP
    """
    subject = Subject.of(model, resolve(folder or _origin(model)).path)
    if source != AUTO:
        return fit(locate(source, store), subject, force=force)
    if store is not None:
        return fit(choose(store, subject), subject)
    every = discover(subject, tell=tell)
    best_of(every, PLACES)
    return _best(every, subject)


def find(
    model: torch.nn.Module, folder: Path, store: Shelf | None = None, tell: Tell = lambda message: None
) -> Tuner | None:
    """Return the best card that fits ``model``, loaded from ``folder``, as `load` would; None if there is none."""
    if store is not None and not store.entries():
        return None
    subject = Subject.of(model, folder)
    every = discover(subject, tell=tell) if store is None else candidates(store, subject)
    return _best(every, subject) if every and every[0].match.fits else None


def locate(source: str | Path, store: Shelf | None = None) -> Found:
    """Return the card in the file ``source``, the one whose digest begins so, or the one on the Hub.

    What comes back names the very same card at any later time: a digest, or a repository at a commit.
    """
    text, file = str(source), Path(source).expanduser()
    if file.is_file():
        return Found(Card.load(file), text, text)
    if is_prefix(text):
        return _by_digest(text, store)
    if isinstance(source, str) and HubName.of(text) is not None and file.suffix != ".safetensors":
        try:
            card, name = pull(text)
        except CardError as error:
            raise type(error)(f"{error} ({text} is no file here either)") from error
        return Found(card, str(name), f"{name} on the Hub")
    first = store or Store()
    raise CardError(
        f"{source} is neither a file here nor the beginning of a digest in the store {first.place} "
        f"({len(first.entries())} cards, see: zoft registry ls) nor a Hub id; give a card's file "
        "(*.tuner.safetensors), a digest, ORG/NAME or auto"
    )


def open_card(source: str | Path, store: Shelf | None = None) -> Card:
    """Return the card that `locate` finds."""
    return locate(source, store).card


def _by_digest(prefix: str, store: Shelf | None) -> Found:
    """The card of ``store``, by default of the local one, of those that come with zoft, or of ``ZOFT_STORE``."""
    first = store or Store()
    if store is None and not _holds(first, prefix):
        come_with_zoft = [one for one in shipped() if one.card.digest.startswith(prefix)]
        if len(come_with_zoft) == 1:
            return come_with_zoft[0]
        first = next((shelf for shelf in shared_stores() if _holds(shelf, prefix)), first)
    card = first.get(prefix)  # which says why there is none
    return Found(card, card.digest, f"in {first.place}")


def _holds(shelf: Shelf, prefix: str) -> bool:
    return any(entry.digest.startswith(prefix) for entry in shelf.entries())


def fit(found: Found, subject: Subject, *, force: bool = False) -> Tuner:
    """Return the networks of a card for the blocks of ``subject`` that it knows; `CardError` unless it fits."""
    card = found.card
    match = found.match if isinstance(found, Candidate) else subject.match(card)
    match.require(force=force)
    pairs = zip(subject.blocks, match.mapping.rows, strict=True)
    networks = unpack(card, [block.name for block, row in pairs if row is not None])
    return Tuner(networks, card, match, found.source, found.place)


def _best(every: Sequence[Candidate], subject: Subject) -> Tuner:
    """The first of ``every``, which fits, and in its place how many others would have."""
    fitting = sum(one.match.fits for one in every)
    of_several = f", first of {fitting} that fit" if fitting > 1 else ""
    return fit(replace(every[0], place=every[0].place + of_several), subject)


def _origin(model: torch.nn.Module) -> str:
    """Where transformers loaded ``model`` from, as the model remembers."""
    name = getattr(model, "name_or_path", "")
    if not (isinstance(name, str) and name):
        raise ModelError("the model does not say where it was loaded from; name it with folder=")
    return name
