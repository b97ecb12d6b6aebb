"""CardStore: the interface of every store of tuner cards, wherever its files are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from zoft.errors import CardError, ZoftError, shown
from zoft.registry.card.file import Card

SUFFIX = ".tuner.safetensors"
SHORTEST_PREFIX = 4
_DIGITS = frozenset("0123456789abcdef")


OnNote = Callable[[str], None]


def ignore(note: str) -> None:
    """Drop the note: the default listener."""


@dataclass(frozen=True)
class Found:
    """A card that was opened, and where it was.

    ``source`` is its name for ``--tuner``, ``place`` is for messages, ``publisher`` the namespace on the Hub that it
    was found in; None for a card from disk or from a store.
    """

    card: Card
    source: str
    place: str
    publisher: str | None = field(default=None, kw_only=True)


class Entry(BaseModel):
    """A card in a store's listing. ``problem`` says why a file cannot be used; its other fields are empty then."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    digest: str
    base_id: str = ""
    base_hash: str | None = None
    architecture_hash: str = ""
    mode: str = ""
    blocks: int = 0
    created: str = ""
    problem: str | None = None

    @classmethod
    def of(cls, digest: str, card: Card) -> "Entry":
        """Describe ``card``."""
        metadata = card.metadata
        return cls(
            digest=digest,
            base_id=metadata.base.id,
            base_hash=metadata.base.hash,
            architecture_hash=metadata.base.architecture_hash,
            mode=metadata.trainable.mode,
            blocks=len(metadata.blocks),
            created=metadata.created.isoformat(),
        )


class CardStore(ABC):
    """Cards by digest. A card is the file ``<SHA-256>.tuner.safetensors``: its name identifies its content."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the store is, for messages."""

    @abstractmethod
    def add(self, card: Card) -> str:
        """Add ``card`` and return its digest; a card that is already there stays as it is."""

    @abstractmethod
    def remove(self, prefix: str) -> str:
        """Delete the card whose digest begins with ``prefix``; return its digest."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Return all cards, newest first."""

    @abstractmethod
    def read(self, digest: str) -> Card:
        """Read the card with this digest and check its content against the digest."""

    def describe(self, digest: str) -> Entry:
        """Return the listing entry of a card; one that cannot be read has its ``problem``, and hides no other card."""
        try:
            return Entry.of(digest, self.read(digest))
        except ZoftError as error:
            return Entry(digest=digest, problem=str(error))

    def get(self, prefix: str) -> Card:
        """Read the card whose digest begins with ``prefix`` and check its content against the digest."""
        return self.read(self.entry(prefix).digest)

    def cards(self, on_note: OnNote = ignore) -> Iterator[tuple[str, Card]]:
        """Yield digest and content of every readable card, newest first; the others are named to ``on_note``."""
        for entry in self.entries():
            problem = entry.problem
            if problem is None:
                try:
                    card = self.read(entry.digest)
                except ZoftError as error:  # removed or damaged since it was listed
                    problem = str(error)
            if problem is None:
                yield entry.digest, card
            else:
                on_note(f"passed over: {problem}")

    def found(self, on_note: OnNote = ignore) -> list[Found]:
        """Return every readable card with where it is, newest first; the others are named to ``on_note``."""
        return [Found(card, digest, f"in {self.place}") for digest, card in self.cards(on_note)]

    def for_base(self, base_hash: str) -> list[Entry]:
        """Return the usable cards made for this base, newest first."""
        return [entry for entry in self.entries() if entry.base_hash == base_hash and entry.problem is None]

    def holds(self, prefix: str) -> bool:
        """Return whether any file of the store has a digest that begins with ``prefix``."""
        return any(entry.digest.startswith(prefix) for entry in self.entries())

    def entry(self, prefix: str) -> Entry:
        """Return the one card whose digest begins with ``prefix`` (4 characters or more)."""
        if len(prefix) < SHORTEST_PREFIX:
            raise CardError(f"{prefix!r} is too short for a digest; give at least {SHORTEST_PREFIX} of its characters")
        found = [entry for entry in self.entries() if entry.digest.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise CardError(
                f"no card in {self.place} has a digest that begins with {shown(prefix)}; see: zoft registry ls"
            )
        raise CardError(f"{len(found)} cards have digests that begin with {prefix}; give more of its characters")


def newest_first(entries: list[Entry]) -> list[Entry]:
    """Return ``entries`` by date, those of one day in a fixed order."""
    return sorted(entries, key=lambda entry: (entry.created, entry.digest), reverse=True)


def checked(card: Card, digest: str, source: str) -> Card:
    """Return ``card``, read from ``source``, if its digest is ``digest``; else raise `CardError`."""
    if card.digest != digest:
        raise CardError(f"{source} holds a card with another digest than its name; {how_to_remove(digest)}")
    return card


def how_to_remove(digest: str) -> str:
    """Return the advice for a file that cannot be used: a command only where the name is a digest.

    >>> how_to_remove("; rm -rf .")
    'delete the file'
    """
    return f"remove it: zoft registry rm {digest[:16]}" if is_digest(digest) else "delete the file"


def is_digest(name: str) -> bool:
    """Return whether ``name`` has the form of a digest."""
    return len(name) == 64 and not set(name) - _DIGITS


def is_prefix(text: str) -> bool:
    """Return whether ``text`` has the form of the beginning of a digest."""
    return len(text) >= SHORTEST_PREFIX and not set(text) - _DIGITS
