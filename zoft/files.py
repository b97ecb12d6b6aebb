"""Write files whole or not at all, lock folders, and find the folder of zoft's own files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from zoft.errors import RunError


def home() -> Path:
    """The folder of cached models, hashes and tuners: ``$ZOFT_HOME``, by default ``~/.cache/zoft``."""
    return Path(os.environ.get("ZOFT_HOME") or Path.home() / ".cache" / "zoft").expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on a clean exit, flush it to disk and rename it to ``path``.

    A reader sees the old file or the new one, never half of one. On an exception the temporary file is removed.
    Works for a file or a folder that does not exist yet. An operating-system error (a full disk, a read-only
    folder) is raised as `RunError` that names ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        temporary.replace(path)
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
        yield
    finally:
        lock.release()
        if [file.name for file in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def _flush(path: Path) -> None:
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
