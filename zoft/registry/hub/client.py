"""Calls to the Hugging Face Hub: transient failures are retried, all others end in a `CardError` without secrets."""

import math
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import huggingface_hub
from huggingface_hub import ModelInfo, constants, errors
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from zoft.errors import CardError, printable, redacted, shown

T = TypeVar("T")

WAITS = (1.0, 3.0)  # seconds before the next try
LONGEST_WAIT = 60.0  # seconds that the Hub may ask for
TIMEOUT = 10.0  # of a request, seconds
LARGEST_ANSWER = 4_000_000  # bytes of JSON
CHUNK = 65_536  # bytes
ENDS: ContextVar[float] = ContextVar("ENDS", default=math.inf)  # `time.monotonic` after which nothing is tried again
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9][A-Za-z0-9._/-]{0,199}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE = (errors.OfflineModeIsEnabled, httpx2.ConnectError, httpx2.TimeoutException, httpx2.ProxyError)


class UnreachableError(CardError):
    """The Hub does not answer: no network, offline mode, or it is down."""


@dataclass(frozen=True)
class HubName:
    """A repository on the Hub, ``org/name``, and a branch, tag or commit of it (None: the main branch).

    >>> HubName.parse("org/name@v1")
    HubName(repo='org/name', revision='v1')
    """

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Read ``ORG/NAME[@REVISION]``; `CardError` for anything else, such as a path."""
        match = _NAME.fullmatch(text)
        if match is None or ".." in text or "//" in text:
            raise CardError(f"'{shown(text, 120)}' is not a Hub id; expected ORG/NAME or ORG/NAME@REVISION")
        try:
            validate_repo_id(match[1])
        except errors.HFValidationError as error:
            raise CardError(f"{text} is not a Hub id: {error}") from error
        return cls(match[1], match[2])

    @classmethod
    def of(cls, text: str) -> "HubName | None":
        """Return the repository that ``text`` names, None if it cannot name one."""
        try:
            return cls.parse(text)
        except CardError:
            return None

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def at(self, commit: str) -> "HubName":
        """Return the same repository at ``commit``."""
        return HubName(self.repo, commit)

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def is_commit(text: str | None) -> bool:
    """Whether ``text`` is the hash of a commit."""
    return text is not None and _COMMIT.fullmatch(text) is not None


def call(what: str, function: Callable[[], T]) -> T:
    """Return ``function()``, retried while the Hub is busy; errors begin with ``what``, the thing requested.

    Raises:
        UnreachableError: no connection, offline mode, or no answer in time.
        CardError: every other refusal, in one sentence.
    """
    for wait in (*WAITS, None):
        try:
            return function()
        except (CardError, MemoryError):
            raise
        except Exception as error:  # an answer of another form (a proxy's page) makes the libraries raise anything
            pause = None if wait is None else _pause(error, wait)
            if pause is None or time.monotonic() + pause > ENDS.get():
                raise _explained(what, error) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def get_json(path: str, params: Mapping[str, Any]) -> Any:
    """Return the Hub's JSON answer to ``GET path``; `CardError` if it has more than `LARGEST_ANSWER` bytes.

    Not by `HfApi`, which reads an answer of any length and retries a Hub that is down for half a minute.
    """
    headers, content = build_hf_headers(), bytearray()
    request: dict[str, Any] = {"params": dict(params), "headers": headers, "timeout": TIMEOUT}
    with get_session().stream("GET", f"{constants.ENDPOINT}{path}", **request) as answer:
        for piece in answer.iter_bytes(CHUNK):
            content += piece
            if len(content) > LARGEST_ANSWER:
                raise CardError(f"the Hub sends more than {LARGEST_ANSWER:,} bytes for {path}; expected a short answer")
            if time.monotonic() > ENDS.get():
                raise UnreachableError(f"the Hub's answer for {path} takes too long")
        encoded = ("content-encoding", "content-length", "transfer-encoding")
        plain = [(name, value) for name, value in answer.headers.items() if name.lower() not in encoded]
        whole = httpx2.Response(answer.status_code, headers=plain, content=bytes(content), request=answer.request)
    hf_raise_for_status(whole)
    return whole.json()


def repository(name: HubName, *, blobs: bool = False) -> ModelInfo:
    """Return the Hub's description of a model repository; with ``blobs`` size and SHA-256 of its files, too."""
    at = "" if name.revision is None else f"/revision/{quote(name.revision, safe='')}"
    return ModelInfo(**get_json(f"/api/models/{name.repo}{at}", {"blobs": True} if blobs else {}))


def without_secrets(text: str) -> str:
    """Return ``text`` as one printable line, `redacted` and without the user's token."""
    token = huggingface_hub.get_token()
    if token:
        text = text.replace(token, "***")
    text = redacted(text)
    return printable(" ".join(text.split()))


def _pause(error: Exception, wait: float) -> float | None:
    """Seconds until the next try; None where a retry would not help."""
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError | httpx2.WriteError):
        return wait
    if not isinstance(error, errors.HfHubHTTPError) or error.response.status_code not in _TRANSIENT:
        return None
    asked = error.response.headers.get("Retry-After", "")
    pause = float(asked) if asked.isascii() and asked.isdigit() else wait
    return pause if pause <= LONGEST_WAIT else None


def _explained(what: str, error: Exception) -> CardError:
    if isinstance(error, _UNREACHABLE):
        why = "offline mode (HF_HUB_OFFLINE)" if isinstance(error, errors.OfflineModeIsEnabled) else _reason(error)
        return UnreachableError(f"{what}: the Hub cannot be reached ({why}); go online, or give a file or digest")
    for kind, text in (
        (errors.GatedRepoError, "is gated; ask for access on its page and log in (hf auth login)"),
        (errors.RevisionNotFoundError, "is not a branch, tag or commit of that repository; see its history"),
        (errors.EntryNotFoundError, "is not on the Hub: the repository exists, the file does not"),
        (
            errors.RepositoryNotFoundError,
            "is not on the Hub, or private: check the spelling, or log in (hf auth login, HF_TOKEN)",
        ),
    ):
        if isinstance(error, kind):
            return CardError(f"{what} {text}")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(what, error)
    return CardError(f"{what}: the Hub's answer cannot be used ({_reason(error)}); try again")


def _refused(what: str, error: errors.HfHubHTTPError) -> CardError:
    status = error.response.status_code
    if status in (401, 403):
        return CardError(
            f"{what}: the Hub refuses this (HTTP {status}); log in with a token that permits it (hf auth login)"
        )
    if status in (409, 412):
        return CardError(f"{what}: someone else has changed the repository since (HTTP {status}); try again")
    asked = error.response.headers.get("Retry-After")
    after = f", and asks to wait {without_secrets(asked)[:40]} s" if asked else ""
    if status in _TRANSIENT:
        return UnreachableError(f"{what}: the Hub is busy or down (HTTP {status}{after}); try later")
    return CardError(f"{what}: the Hub refuses this (HTTP {status}): {_reason(error)}")


def _reason(error: BaseException) -> str:
    text = without_secrets(str(error)) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
