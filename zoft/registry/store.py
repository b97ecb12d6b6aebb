"""The local store of tuner cards: files named by their content, and an index to find them by."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from zoft.errors import CardError
from zoft.files import home, write_text
from zoft.registry.card import Card

SUFFIX = ".tuner.safetensors"
LOCK_SECONDS = 60
SHORTEST_PREFIX = 4


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


_ENTRIES = TypeAdapter(list[Entry])


class Store:
    """Cards in a folder, by default ``tuners/`` under `zoft.files.home`; several processes may use it at once.

    A card lies in ``<SHA-256>.tuner.safetensors``, so that a name tells its content and nothing is ever overwritten
    with something else. ``index.json`` is a cache: built from the files whenever it does not name exactly those.

    >>> store = Store()  # doctest: +SKIP
    >>> digest = store.add(Card.load("smollm2.tuner.safetensors"))  # doctest: +SKIP
    >>> store.get(digest[:8]).metadata.base.id  # doctest: +SKIP
    'HuggingFaceTB/SmolLM2-135M'
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else home() / "tuners"
        self._lock = filelock.FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)  # one object may nest it

    def add(self, card: Card) -> str:
        """Keep ``card`` and return its digest; one that is there already stays as it is."""
        digest = card.digest
        with self._locked():
            if not self.path(digest).is_file():
                card.save(self.path(digest))
            self._rebuild()
        return digest

    def remove(self, prefix: str) -> str:
        """Delete the card whose digest begins with ``prefix``; return its digest."""
        with self._locked():
            digest = self.find(prefix).digest
            self.path(digest).unlink(missing_ok=True)
            self._rebuild()
        return digest

    def entries(self) -> list[Entry]:
        """Return all cards, newest first."""
        entries = self._index()
        if {entry.digest for entry in entries} != self._digests():
            with self._locked():
                entries = self._rebuild()
        return sorted(entries, key=lambda entry: (entry.created, entry.digest), reverse=True)

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
            raise CardError(f"no card in {self.folder} has a digest that begins with {prefix}; see: zoft registry ls")
        raise CardError(f"{len(found)} cards have digests that begin with {prefix}; give more of its characters")

    def get(self, prefix: str) -> Card:
        """Read the card whose digest begins with ``prefix`` and check that its content is what its name says."""
        digest = self.find(prefix).digest
        return _read(self.path(digest), digest)

    def path(self, digest: str) -> Path:
        """Where the card with this digest lies."""
        return self.folder / f"{digest}{SUFFIX}"

    def _digests(self) -> set[str]:
        return {file.name.removesuffix(SUFFIX) for file in self.folder.glob(f"[!.]*{SUFFIX}")}

    def _index(self) -> list[Entry]:
        try:
            return _ENTRIES.validate_json((self.folder / "index.json").read_bytes())
        except (OSError, ValidationError):  # absent, damaged, or of another version of zoft: built anew
            return []

    def _rebuild(self) -> list[Entry]:
        """Write the index for the files that are there; only those that the old one does not describe are read."""
        known = {entry.digest: entry for entry in self._index() if entry.problem is None}
        entries = [known.get(digest) or _describe(self.path(digest), digest) for digest in sorted(self._digests())]
        text = json.dumps([entry.model_dump() for entry in entries], indent=1)
        write_text(self.folder / "index.json", text + "\n")
        return entries

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's lock: one process changes it at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock:
                yield
        except filelock.Timeout as error:
            raise CardError(
                f"another process has held the store {self.folder} for {LOCK_SECONDS} s; wait for it, or end it"
            ) from error
        except OSError as error:
            raise CardError(f"the store {self.folder} cannot be written: {error.strerror or error}") from error


def _read(file: Path, digest: str) -> Card:
    card = Card.load(file)
    if card.digest != digest:
        raise CardError(f"{file} holds another card than its name says; remove it: zoft registry rm {digest[:16]}")
    return card


def _describe(file: Path, digest: str) -> Entry:
    try:
        card = _read(file, digest).metadata
    except CardError as error:  # one bad file must not hide the others; ls shows what is wrong with it
        return Entry(digest=digest, problem=str(error))
    return Entry(
        digest=digest,
        base_id=card.base.id,
        base_hash=card.base.hash,
        architecture_hash=card.base.architecture_hash,
        mode=card.trainable.mode,
        blocks=len(card.blocks),
        created=card.created.isoformat(),
    )
