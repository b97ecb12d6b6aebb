"""LocalStore: a folder of tuner cards, each file named by its digest, with an index."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from pydantic import TypeAdapter, ValidationError

from zoft.errors import CardError, ZoftError, printable
from zoft.files import home, sweep, write_text
from zoft.registry.card.file import Card
from zoft.registry.stores.store import SUFFIX, CardStore, Entry, checked, newest_first

LOCK_SECONDS = 60  # that a change waits for another process
LIST_SECONDS = 2  # that a listing waits: it needs no index
_ENTRIES = TypeAdapter(list[Entry])


class LocalStore(CardStore):
    """Cards in a folder, by default ``tuners/`` under `zoft.files.home`; several processes may use it at once.

    A card is the file ``<SHA-256>.tuner.safetensors``, so no file is ever overwritten with other content.
    ``index.json`` is a cache, rebuilt whenever it does not name exactly the files in the folder, and not needed.

    >>> store = LocalStore()  # doctest: +SKIP
    >>> digest = store.add(Card.load("smollm2.tuner.safetensors"))  # doctest: +SKIP
    >>> store.get(digest[:8]).metadata.base.id  # doctest: +SKIP
    'HuggingFaceTB/SmolLM2-135M'
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else home() / "tuners"
        self._lock = filelock.FileLock(self.folder / ".lock")  # reentrant in one object

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def add(self, card: Card) -> str:
        """Add ``card`` and return its digest; a card that is already there stays as it is."""
        digest = card.digest
        with self._locked():
            if not self.path(digest).is_file():
                card.save(self.path(digest))
            self._rebuild()
        return digest

    def remove(self, prefix: str) -> str:
        """Delete the card whose digest begins with ``prefix``; return its digest."""
        with self._locked():
            digest = self.entry(prefix).digest
            self.path(digest).unlink(missing_ok=True)
            self._rebuild()
        return digest

    def entries(self) -> list[Entry]:
        """Return all cards, newest first."""
        entries = self._index()
        if {entry.digest for entry in entries} != self._digests():
            try:
                with self._locked(LIST_SECONDS):
                    entries = self._rebuild()
            except ZoftError:  # a store that can only be read, or is held: listed without its index
                entries = self._described()
        return newest_first(entries)

    def read(self, digest: str) -> Card:
        """Read the card with this digest and check its content against the digest."""
        file = self.path(digest)
        return checked(Card.load(file), digest, printable(str(file)))

    def path(self, digest: str) -> Path:
        """Return the file of the card with this digest."""
        return self.folder / f"{digest}{SUFFIX}"

    def _digests(self) -> set[str]:
        return {file.name.removesuffix(SUFFIX) for file in self.folder.glob(f"[!.]*{SUFFIX}")}

    def _index(self) -> list[Entry]:
        try:
            return _ENTRIES.validate_json((self.folder / "index.json").read_bytes())
        except (OSError, ValidationError):  # absent, damaged, or of another version of zoft: rebuilt
            return []

    def _rebuild(self) -> list[Entry]:
        """Write the index of the files in the folder; only files that the old index does not describe are read."""
        entries = self._described()
        text = json.dumps([entry.model_dump() for entry in entries], indent=1)
        write_text(self.folder / "index.json", text + "\n")
        return entries

    def _described(self) -> list[Entry]:
        known = {entry.digest: entry for entry in self._index() if entry.problem is None}
        return [known.get(digest) or self.describe(digest) for digest in sorted(self._digests())]

    @contextmanager
    def _locked(self, seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """Hold the store's lock: one process changes it at a time."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock.acquire(timeout=seconds):
                sweep(self.folder, older_than=3600)  # other machines may share it without sharing locks
                yield
        except filelock.Timeout as error:
            raise CardError(
                f"another process has held the store {self.folder} for {seconds:g} s; wait until it ends, or stop it"
            ) from error
        except OSError as error:
            raise CardError(f"the store {self.folder} cannot be written: {error.strerror or error}") from error
