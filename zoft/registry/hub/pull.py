"""Pull cards from the Hugging Face Hub: of bounded size, checked against the published digest, pinned to a commit."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.utils import tqdm

from zoft.errors import CardError
from zoft.registry.card.file import MAX_BYTES, Card
from zoft.registry.hub.client import TIMEOUT, HubName, UnreachableError, call, is_commit

CARD_FILE = "tuner.safetensors"


@dataclass(frozen=True)
class Fetched:
    """A file of a repository: its path in the Hub's cache, its content, and the repository at its commit."""

    path: Path
    content: bytes
    name: HubName


def pull(source: str | HubName) -> tuple[Card, HubName]:
    """Return the card of a repository, and the repository at the commit that it was read from.

    The Hub's own cache is used: a cached commit needs no network, and without one a branch is read from the cache.
    The size is checked before the download, then the content against the digest that the Hub publishes, then the card.

    Raises:
        UnreachableError: it is not in the cache and the Hub does not answer.
        CardError: no such repository, revision or card, or a damaged one.

    >>> card, name = pull("org/name@v1")  # doctest: +SKIP
    >>> str(name)  # doctest: +SKIP
    'org/name@7b42fd41a1d2c5d1a76e1a9ab0d10b8d3f8a7d10'
    """
    name = source if isinstance(source, HubName) else HubName.parse(source)
    fetched = fetch(name, CARD_FILE, MAX_BYTES - 1)
    return Card.parse(fetched.content, f"{fetched.name}/{CARD_FILE}"), fetched.name


def fetch(name: HubName, file: str, limit: int) -> Fetched:
    """Return ``file`` of the repository, of at most ``limit`` bytes; `CardError` if it cannot be read whole."""
    if (cached := _cached(name, file)) is not None and (name.pinned or is_offline_mode()):
        return _checked(name, file, cached, limit)
    what = f"{name}/{file}"
    try:
        call(what, lambda: _check_announced(name, file, limit))
    except UnreachableError:
        if cached is None:
            raise
        return _checked(name, file, cached, limit)
    return _checked(name, file, call(what, lambda: _download(name, file, limit)), limit)


def _check_announced(name: HubName, file: str, limit: int) -> None:
    """Raise `CardError` if the Hub announces a file that is too large or cannot be checked."""
    url = huggingface_hub.hf_hub_url(name.repo, file, revision=name.revision)
    metadata = huggingface_hub.get_hf_file_metadata(url, timeout=TIMEOUT)
    if not is_commit(metadata.commit_hash) or metadata.etag is None:
        missing = "commit" if metadata.etag else "ETag"
        raise CardError(f"{name}/{file}: the Hub's answer names no {missing}, so it cannot be checked; see HF_ENDPOINT")
    if metadata.size is None or metadata.size > limit:
        found = "of unknown size" if metadata.size is None else f"of {metadata.size:,} bytes"
        raise CardError(f"{name}/{file} is {found}, expected at most {limit:,} bytes; it was not downloaded")


def _download(name: HubName, file: str, limit: int) -> Path:
    class Bounded(tqdm):
        """A silent progress bar that aborts a download of more bytes than announced."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.left = limit
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            self.left -= int(n or 0)
            if self.left < 0:
                raise CardError(f"{name}/{file} sends more than {limit:,} bytes; not downloaded")
            return super().update(n)

    return Path(
        huggingface_hub.hf_hub_download(
            name.repo, file, revision=name.revision, tqdm_class=Bounded, etag_timeout=TIMEOUT
        )
    )


def _cached(name: HubName, file: str) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(name.repo, file, revision=name.revision)
    return Path(found) if isinstance(found, str) else None


def _checked(name: HubName, file: str, path: Path, limit: int) -> Fetched:
    """Read ``path`` of the Hub's cache and compare it with the digest that the cache keeps it under."""
    try:
        with path.open("rb") as handle:
            content = handle.read(limit + 1)
    except OSError as error:
        raise CardError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > limit:
        raise CardError(f"{name}/{file} has more than {limit:,} bytes; it is not a tuner card")
    blob = path.parent / path.readlink() if path.is_symlink() else path  # without symlinks the name is not a digest
    digest = {40: _git_sha1, 64: lambda data: hashlib.sha256(data).hexdigest()}.get(len(blob.name))
    if blob.parent.name == "blobs" and digest is not None and digest(content) != blob.name:
        for damaged in (path.resolve(), blob, path):  # a blob may itself point into a store shared by repositories
            damaged.unlink(missing_ok=True)
        raise CardError(
            f"{name}/{file} is not what the Hub published (digest {blob.name[:16]} expected, {digest(content)[:16]} "
            "found); it was removed from the cache: try again"
        )
    return Fetched(path, content, name.at(path.relative_to(_snapshots(path)).parts[0]))


def _snapshots(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name == "snapshots")


def _git_sha1(content: bytes) -> str:
    """The digest that git, and the Hub for files outside of LFS, names a file by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
