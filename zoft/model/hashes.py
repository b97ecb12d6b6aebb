"""SHA-256 of files, cached by path, size and modification time."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from zoft.files import home, write_text


def cached(kind: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """Return ``compute()``, or its cached result for the same files.

    Files are the same if their paths, sizes and modification times (ns) are. The cache is ``hashes/`` under
    `zoft.files.home`; an unreadable entry is computed again.
    """
    state = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]
    key = hashlib.sha256(json.dumps([kind, state]).encode()).hexdigest()
    entry = home() / "hashes" / key
    if entry.is_file() and len(value := entry.read_text(encoding="utf-8")) == 64:
        return value
    value = compute()
    write_text(entry, value)
    return value


def file_digest(file: Path) -> str:
    """Return the SHA-256 hex digest of ``file``, cached."""

    def compute() -> str:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    return cached("file", [file], compute)
