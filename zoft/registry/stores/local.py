"""The local store of tuner cards: files named by their content, and an index to find them by."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from pydantic import TypeAdapter, ValidationError

from zoft.errors import CardError
from zoft.files import home, write_text
from zoft.registry.card.card import Card
from zoft.registry.stores.store import SUFFIX, Entry, Shelf, checked, newest_first

LOCK_SECONDS = 60


_ENTRIES = TypeAdapter(list[Entry])


class Store(Shelf):
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

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

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
        return newest_first(entries)

    def read(self, digest: str) -> Card:
        """Read the card with this digest and check that its content is what its name says."""
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
    return checked(Card.load(file), digest, str(file))


def _describe(file: Path, digest: str) -> Entry:
    try:
        return Entry.of(digest, _read(file, digest))
    except CardError as error:  # one bad file must not hide the others; ls shows what is wrong with it
        return Entry(digest=digest, problem=str(error))
