"""Write files whole or not at all, lock folders, and find the folder of zoft's own files."""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from zoft.errors import RunError

_LONGEST = 200  # characters of a name that a temporary name repeats
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def home() -> Path:
    """The folder of cached models, hashes and tuners: ``$ZOFT_HOME``, by default ``~/.cache/zoft``."""
    return Path(os.environ.get("ZOFT_HOME") or Path.home() / ".cache" / "zoft").expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on a clean exit, flush it to disk and rename it to ``path``.

    A reader sees the old file or the new one, never half of one. On an exception the temporary file is removed.
    Works for a file or a folder that does not exist yet. An operating-system error (a full disk, a read-only
    folder) is raised as `RunError` that names ``path``. No two writers share a temporary name: threads do not, nor
    containers whose processes have the same PID.
    """
    temporary = path.with_name(f".{path.name[:_LONGEST]}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)  # else a power cut may undo the rename
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; free space or choose another place") from error
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for one process; it is created, and removed again if it is still empty at the end.

    Temporary files that killed processes have left there are removed.

    `RunError` if another process holds it, or if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", blocking=False)
        lock.acquire()
    except Timeout as error:
        raise RunError(f"{folder} is in use by another process; wait for it, or choose another --out") from error
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    try:
        sweep(folder)
        yield
    finally:
        lock.release()
        if [file.name for file in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def sweep(folder: Path, older_than: float = 0.0) -> None:
    """Remove what killed writers left in ``folder`` and the folders in it.

    Call it where no one else writes there, or name an age in seconds that no live temporary file reaches.
    """
    oldest = time.time() - older_than
    for pattern in (".*.tmp", "*/.*.tmp"):
        for orphan in folder.glob(pattern):
            if _TEMPORARY.fullmatch(orphan.name):
                with contextlib.suppress(OSError):  # gone since
                    if not older_than or orphan.stat().st_mtime < oldest:
                        _remove(orphan)


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    for folder in [path, *path.rglob("*")] if path.is_dir() else []:
        if folder.is_dir():
            _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Force the names in ``folder`` to the disk, where the system can."""
    with contextlib.suppress(OSError):  # some systems and file systems have no fsync of folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
