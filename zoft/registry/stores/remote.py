"""A store of tuner cards on anything that fsspec reads and writes: a shared folder, an object store, a web server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from zoft.errors import CardError
from zoft.files import home
from zoft.registry.card.card import MAX_BYTES, Card
from zoft.registry.hub.client import without_secrets
from zoft.registry.stores.local import Store
from zoft.registry.stores.store import SUFFIX, Entry, Shelf, checked, is_digest, newest_first


def open_store(place: str | Path | None = None) -> Shelf:
    """Return the store at ``place``: a folder, or an address that fsspec knows; None: the local store.

    >>> open_store("s3://bucket/tuners").place  # doctest: +SKIP
    's3://bucket/tuners'
    """
    text = "" if place is None else str(place)
    if not text:
        return Store()
    if text.startswith("file://"):
        return Store(Path(text.removeprefix("file://")))
    return RemoteStore(text) if "://" in text else Store(Path(text).expanduser())


def shared_stores() -> list[Shelf]:
    """Return the store that the environment variable ``ZOFT_STORE`` names, looked at after the local one; or none."""
    place = os.environ.get("ZOFT_STORE")
    return [open_store(place)] if place else []


class RemoteStore(Shelf):
    """Cards at an address such as ``s3://bucket/tuners``.

    A file's name is the digest of its content, so nothing is ever overwritten with something else, no lock is needed,
    and a card that was read once is kept under ``remote/`` in `zoft.files.home`. A file is read up to the size that a
    card may have, and one that is torn or not what its name says is passed over and named.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._driver():
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(self.url)

    @property
    def place(self) -> str:
        """The address, without what is secret in it."""
        return without_secrets(self.url)

    def add(self, card: Card) -> str:
        """Write ``card`` unless it is there."""
        digest, content = card.digest, card.content
        with self._driver():
            if not self._files.exists(self._path(digest)):
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(self._path(digest), content)
        return digest

    def remove(self, prefix: str) -> str:
        """Delete the card whose digest begins with ``prefix``; return its digest."""
        digest = self.find(prefix).digest
        with self._driver():
            self._files.rm_file(self._path(digest))
        return digest

    def entries(self) -> list[Entry]:
        """Return all cards, newest first; cards that were not seen before are read."""
        return newest_first([self._describe(digest) for digest in self._digests()])

    def read(self, digest: str) -> Card:
        """Read a card, from the copy here if there is one."""
        copy = home() / "remote" / f"{digest}{SUFFIX}"
        if copy.is_file():
            try:
                return checked(Card.load(copy), digest, str(copy))
            except CardError:  # a damaged copy is worth no more than none
                copy.unlink(missing_ok=True)
        source = f"{self.place}/{digest}{SUFFIX}"
        with self._driver(), self._files.open(self._path(digest), "rb") as file:
            content = file.read(MAX_BYTES)
        card = checked(Card.parse(content, source), digest, source)
        card.save(copy)
        return card

    def _digests(self) -> list[str]:
        with self._driver():
            self._files.invalidate_cache()
            if not self._files.exists(self._root):
                return []
            names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False)]
        digests = [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]
        return sorted(filter(is_digest, digests))

    def _describe(self, digest: str) -> Entry:
        try:
            return Entry.of(digest, self.read(digest))
        except CardError as error:
            return Entry(digest=digest, problem=str(error))

    def _path(self, digest: str) -> str:
        return f"{self._root.rstrip('/')}/{digest}{SUFFIX}"

    @contextmanager
    def _driver(self) -> Iterator[None]:
        try:
            yield
        except CardError:
            raise
        except Exception as error:  # drivers raise what they like; nothing of zoft's own runs in here
            why = without_secrets(str(error))[:200] or type(error).__name__
            raise CardError(
                f"the store {self.place} cannot be used ({why}); check the address, its driver and your rights there"
            ) from error
