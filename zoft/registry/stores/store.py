"""What every store of tuner cards offers, wherever its files lie."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from zoft.errors import CardError
from zoft.registry.card.card import Card

SUFFIX = ".tuner.safetensors"
SHORTEST_PREFIX = 4
_DIGITS = frozenset("0123456789abcdef")


class Entry(BaseModel):
    """A card in the store. ``problem`` says why a file cannot be used; then the fields of its text are empty."""

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
        said = card.metadata
        return cls(
            digest=digest,
            base_id=said.base.id,
            base_hash=said.base.hash,
            architecture_hash=said.base.architecture_hash,
            mode=said.trainable.mode,
            blocks=len(said.blocks),
            created=said.created.isoformat(),
        )


class Shelf(ABC):
    """Cards by their digests. A card lies in ``<SHA-256>.tuner.safetensors``: a name tells its content."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it is, as a person would say it."""

    @abstractmethod
    def add(self, card: Card) -> str:
        """Keep ``card`` and return its digest; one that is there already stays as it is."""

    @abstractmethod
    def remove(self, prefix: str) -> str:
        """Delete the card whose digest begins with ``prefix``; return its digest."""

    @abstractmethod
    def entries(self) -> list[Entry]:
        """Return all cards, newest first."""

    @abstractmethod
    def read(self, digest: str) -> Card:
        """Read the card with this digest and check that its content is what its name says."""

    def get(self, prefix: str) -> Card:
        """Read the card whose digest begins with ``prefix`` and check that its content is what its name says."""
        return self.read(self.find(prefix).digest)

    def cards(self) -> Iterator[tuple[str, Card]]:
        """Yield digest and content of every readable card, newest first."""
        for entry in self.entries():
            if entry.problem is None:
                try:
                    yield entry.digest, self.read(entry.digest)
                except CardError:  # removed or damaged since it was listed; the next listing says so
                    continue

    def for_base(self, base_hash: str) -> list[Entry]:
        """Return the usable cards made for this base, newest first."""
        return [entry for entry in self.entries() if entry.base_hash == base_hash and entry.problem is None]

    def find(self, prefix: str) -> Entry:
        """Return the one card whose digest begins with ``prefix`` (4 characters or more)."""
        if len(prefix) < SHORTEST_PREFIX:
            raise CardError(f"{prefix!r} is too short for a digest; give at least {SHORTEST_PREFIX} of its characters")
        found = [entry for entry in self.entries() if entry.digest.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise CardError(f"no card in {self.place} has a digest that begins with {prefix}; see: zoft registry ls")
        raise CardError(f"{len(found)} cards have digests that begin with {prefix}; give more of its characters")


def newest_first(entries: list[Entry]) -> list[Entry]:
    """Return ``entries`` by date, those of a day in a fixed order."""
    return sorted(entries, key=lambda entry: (entry.created, entry.digest), reverse=True)


def checked(card: Card, digest: str, source: str) -> Card:
    """Return ``card`` if its digest is ``digest``, its name in ``source``; else `CardError`."""
    if card.digest != digest:
        raise CardError(f"{source} holds another card than its name says; remove it: zoft registry rm {digest[:16]}")
    return card


def is_digest(name: str) -> bool:
    """Whether ``name`` can be a digest."""
    return len(name) == 64 and not set(name) - _DIGITS


def is_prefix(text: str) -> bool:
    """Whether ``text`` can be the beginning of a digest in a store."""
    return len(text) >= SHORTEST_PREFIX and not set(text) - _DIGITS
