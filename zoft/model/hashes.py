"""SHA-256 of files, cached by path, size, times, inode and device."""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from zoft.errors import RunError
from zoft.files import home, write_text

_DIGEST = re.compile(r"[0-9a-f]{64}")


def cached(kind: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """Return ``compute()``, or its cached result for the same files.

    Files are the same if their paths, sizes, inodes, devices and times of modification and change (ns) are; programs
    can set the first of the two times, but not the second. The cache is ``hashes/`` under `zoft.files.home`. An entry
    that cannot be read is computed again, and a cache that cannot be written does without: neither stops a command.
    """
    paths = sorted(files)
    state = [_state(file) for file in paths]
    key = hashlib.sha256(json.dumps([kind, state]).encode()).hexdigest()
    entry = home() / "hashes" / key
    with contextlib.suppress(OSError, ValueError):
        if _DIGEST.fullmatch(value := entry.read_text(encoding="ascii")):
            return value
    value = compute()
    if state == [_state(file) for file in paths]:  # else a file was written while it was read
        with contextlib.suppress(RunError):
            write_text(entry, value)
    return value


def _state(file: Path) -> list[str | int]:
    facts = file.stat()
    times = facts.st_mtime_ns, facts.st_ctime_ns
    return [str(file.resolve()), facts.st_size, *times, facts.st_ino, facts.st_dev]


def file_digest(file: Path) -> str:
    """Return the SHA-256 hex digest of ``file``, cached."""

    def compute() -> str:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    return cached("file", [file], compute)
