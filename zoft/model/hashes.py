"""SHA-256 of files, remembered by name, size and time of change."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from zoft.files import home, write_text


def remembered(kind: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """Return ``compute()``, or what it returned for these very files before.

    Files count as the same while their paths, sizes and modification times (ns) are. Kept in ``hashes/`` under
    `zoft.files.home`; an entry that cannot be read is computed anew.
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
    """Return the SHA-256 hex digest of ``file``, computed once for its present content."""

    def compute() -> str:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    return remembered("file", [file], compute)
