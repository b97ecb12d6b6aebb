"""From the name of a card to the frozen networks that drive a model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from zoft.errors import CardError, ModelError
from zoft.model.sources import resolve
from zoft.registry.card.file import Card
from zoft.registry.card.networks import unpack
from zoft.registry.card.schema import TunerCard
from zoft.registry.hub.client import HubName
from zoft.registry.hub.pull import pull
from zoft.registry.match.candidates import Candidate, require_usable, untrusted
from zoft.registry.match.discover import PLACES, discover
from zoft.registry.match.identity import ModelIdentity
from zoft.registry.match.matching import Match, match
from zoft.registry.stores.local import LocalStore
from zoft.registry.stores.remote import shared_stores
from zoft.registry.stores.shipped import shipped_cards
from zoft.registry.stores.store import CardStore, Found, OnNote, ignore, is_prefix
from zoft.tuner.networks import PertNN

AUTO = "auto"


@dataclass(frozen=True)
class Tuner:
    """A card's networks, frozen and cut to the blocks of a model, with how the card fits it.

    ``source`` names this very card for ``--tuner`` at any later time, ``place`` says where it was found.
    """

    networks: PertNN
    card: Card
    match: Match
    source: str
    place: str

    @property
    def metadata(self) -> TunerCard:
        """The card's JSON."""
        return self.card.metadata

    @property
    def digest(self) -> str:
        """Digest of the card."""
        return self.card.digest


def load(
    source: str | Path | Found,
    model: torch.nn.Module,
    *,
    folder: str | Path | None = None,
    force: bool = False,
    store: CardStore | None = None,
    trust: bool = False,
    on_note: OnNote = ignore,
    on_wait: OnNote = ignore,
) -> Tuner:
    """Return the networks of a card for ``model``, checked and matched.

    Args:
        source: a card's file, the first characters of its digest in the store, ``org/name[@revision]`` on the Hub, a
            card from `find_card`, or ``"auto"``: the card that fits best.
        model: loaded and not yet trained; its trainable parameters are the blocks.
        folder: where the model was loaded from (folder, Hub id or ``.gguf`` file); default: ``model.name_or_path``.
        force: accept a card of the same architecture that was made for other weights.
        store: where ``"auto"`` and digests are looked up; default: local stores and the Hub, see
            `zoft.registry.discover`.
        trust: let ``"auto"`` use cards of every publisher on the Hub, not only of those that the model names.
        on_note: called with a sentence for each card that is passed over, and if the Hub cannot be reached.
        on_wait: called with what ``"auto"`` waits for.

    Raises:
        CardError: no such card, a damaged one, or one that does not fit.

    >>> tuner = load("org/base-tuner", model)  # doctest: +SKIP
    >>> optimizer = zoft.optim.ZOFineTuner(model, tuner, lr=1e-6, eps=1e-3)  # doctest: +SKIP
    """
    identity = ModelIdentity.of(model, resolve(folder or _origin(model)).path)
    if source != AUTO:
        found = source if isinstance(source, Found) else find_card(source, store)
        return make_tuner(found, identity, force=force)
    ranked = discover(identity, store, trust=trust, on_note=on_note, on_wait=on_wait)
    require_usable(ranked, PLACES if store is None else store.place)
    return _first(ranked, identity)


def find_tuner(
    model: torch.nn.Module,
    folder: Path,
    store: CardStore | None = None,
    *,
    trust: bool = False,
    on_note: OnNote = ignore,
    on_wait: OnNote = ignore,
) -> Tuner | None:
    """Return the tuner that `load` gives for ``"auto"``, for ``model`` loaded from ``folder``; None if there is none.

    A card that fits and may not be used without ``trust`` is named to ``on_note``.
    """
    if store is not None and not store.entries():
        return None
    identity = ModelIdentity.of(model, folder)
    ranked = discover(identity, store, trust=trust, on_note=on_note, on_wait=on_wait)
    if ranked and ranked[0].usable:
        return _first(ranked, identity)
    if other := untrusted(ranked):
        on_note(other)
    return None


def find_card(source: str | Path, store: CardStore | None = None) -> Found:
    """Open the card that ``source`` names: a file, the beginning of a digest, or a repository on the Hub.

    The result's ``source`` names the very same card at any later time: a file, a digest, or a repository at a commit.
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
            raise type(error)(f"{error} ({text} is not a local file either)") from error
        return Found(card, str(name), f"{name} on the Hub")
    first = store or LocalStore()
    raise CardError(
        f"{source} is neither a local file, nor the beginning of a digest in the store {first.place} "
        f"({len(first.entries())} cards, see: zoft registry ls), nor a Hub id; give a card's file "
        "(*.tuner.safetensors), a digest, ORG/NAME or auto"
    )


def open_card(source: str | Path, store: CardStore | None = None) -> Card:
    """Return the card of `find_card`."""
    return find_card(source, store).card


def make_tuner(found: Found, model: ModelIdentity, *, force: bool = False) -> Tuner:
    """Return the networks of a card for the blocks of ``model`` that it knows; `CardError` unless it fits."""
    how = found.match if isinstance(found, Candidate) else match(found.card, model)
    how.require(force=force)
    pairs = zip(model.blocks, how.mapping.rows, strict=True)
    networks = unpack(found.card, [block.name for block, row in pairs if row is not None])
    return Tuner(networks, found.card, how, found.source, found.place)


def _by_digest(prefix: str, store: CardStore | None) -> Found:
    """The card in ``store``; by default in the local store, among the shipped cards, or in ``ZOFT_STORE``."""
    first = store or LocalStore()
    if store is None and not first.holds(prefix):
        shipped = [one for one in shipped_cards() if one.card.digest.startswith(prefix)]
        if len(shipped) == 1:
            return shipped[0]
        first = next((shared for shared in shared_stores() if shared.holds(prefix)), first)
    card = first.get(prefix)  # raises the error if there is none
    return Found(card, card.digest, f"in {first.place}")


def _first(ranked: Sequence[Candidate], model: ModelIdentity) -> Tuner:
    """The tuner of the first of ``ranked``, which is usable; its place names its publisher and counts the others."""
    fitting, first = sum(one.usable for one in ranked), ranked[0]
    by = f", published by {first.publisher}" if first.publisher else ""
    of_several = f", first of {fitting} that fit" if fitting > 1 else ""
    return make_tuner(replace(first, place=f"{first.place}{by}{of_several}"), model)


def _origin(model: torch.nn.Module) -> str:
    """Where transformers loaded ``model`` from, as the model remembers."""
    name = getattr(model, "name_or_path", "")
    if not (isinstance(name, str) and name):
        raise ModelError("the model does not say where it was loaded from; name it with folder=")
    return name
