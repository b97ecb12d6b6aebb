"""RemoteStore: tuner cards on any file system that fsspec supports, such as an object store or a web server."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from zoft.errors import CardError, ZoftError
from zoft.files import home
from zoft.registry.card.file import MAX_BYTES, Card
from zoft.registry.hub.client import without_secrets
from zoft.registry.stores.local import LocalStore
from zoft.registry.stores.store import SUFFIX, CardStore, Entry, checked, is_digest, newest_first


def open_store(place: str | Path | None = None) -> CardStore:
    """Return the store at ``place``: a folder, or an address of fsspec; None: the local store.

    >>> open_store("s3://bucket/tuners").place  # doctest: +SKIP
    's3://bucket/tuners'
    """
    text = "" if place is None else str(place)
    if not text:
        return LocalStore()
    if text.startswith("file://"):
        return LocalStore(Path(text.removeprefix("file://")))
    return RemoteStore(text) if "://" in text else LocalStore(Path(text).expanduser())


def shared_stores() -> list[CardStore]:
    """Return the store that the environment variable ``ZOFT_STORE`` names, in a list; an empty list if it is unset."""
    place = os.environ.get("ZOFT_STORE")
    return [open_store(place)] if place else []


class RemoteStore(CardStore):
    """Cards at an address such as ``s3://bucket/tuners``.

    A file is named by the digest of its content, so no file is ever overwritten with other content and no lock is
    needed. A card that was read is cached under ``remote/`` in `zoft.files.home`. At most the size limit of a card is
    read of a file; `entries` lists a file that is damaged or has another digest with its problem.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with self._driver():
            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(self.url)

    @property
    def place(self) -> str:
        """The address without secrets."""
        return without_secrets(self.url)

    def add(self, card: Card) -> str:
        """Write ``card`` unless it is already there; return its digest."""
        digest, content = card.digest, card.content
        with self._driver():
            if not self._files.exists(self._path(digest)):
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(self._path(digest), content)
        return digest

    def remove(self, prefix: str) -> str:
        """Delete the card whose digest begins with ``prefix``; return its digest."""
        digest = self.entry(prefix).digest
        with self._driver():
            self._files.rm_file(self._path(digest))
        return digest

    def entries(self) -> list[Entry]:
        """Return all cards, newest first; cards that are not in the cache are read."""
        return newest_first([self.describe(digest) for digest in self._digests()])

    def read(self, digest: str) -> Card:
        """Read a card, from the cache if it is there."""
        copy = home() / "remote" / f"{digest}{SUFFIX}"
        if copy.is_file():
            try:
                return checked(Card.load(copy), digest, str(copy))
            except CardError:  # a damaged copy is read again from the store
                with suppress(OSError):
                    copy.unlink(missing_ok=True)
        source = f"{self.place}/{digest}{SUFFIX}"
        with self._driver(), self._files.open(self._path(digest), "rb") as file:
            content = file.read(MAX_BYTES)
        card = checked(Card.parse(content, source), digest, source)
        with suppress(ZoftError):  # a cache that cannot be written
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

    def _hidden(self, text: str) -> str:
        """``text`` of a driver, which may quote a part of the address alone: its user, password or signature."""
        user = re.search(r"://(\S*)@", self.url)
        query = re.search(r"[?#](.*)", self.url)
        secret = f"{user[1] if user else ''}&{query[1] if query else ''}"
        parts = {part for form in (secret, unquote(secret)) for part in re.split(r"[:&=@/?#%]", form)}
        for part in sorted(parts, key=len, reverse=True):
            text = text.replace(part, "***") if len(part) > 5 else text
        return text

    def _path(self, digest: str) -> str:
        return f"{self._root.rstrip('/')}/{digest}{SUFFIX}"

    @contextmanager
    def _driver(self) -> Iterator[None]:
        try:
            yield
        except CardError:
            raise
        except Exception as error:  # drivers raise any exception; no code of zoft runs in here
            why = without_secrets(self._hidden(str(error)))[:200] or type(error).__name__
            raise CardError(
                f"the store {self.place} cannot be used ({why}); check the address, its driver and your permissions"
            ) from error
