"""A folder that several processes work in: its settings, the finished runs, and a lock for each run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from zoft.compare.cells import Cell, Outcome
from zoft.errors import RunError
from zoft.files import write_text
from zoft.folders import Folder


class SharedFolder(Folder):
    """A folder that several processes may share: ``settings.json`` and ``locks/``.

    Locks are the operating system's: when a process is killed, its locks are free again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, restart="restore it from a copy, or choose another folder")
        self._locks = path / "locks"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Start with ``settings``, or resume and add those that are new.

        Raises:
            RunError: the folder has other values, whose runs could not be compared with new ones; or it is not
                writable.
        """
        file = self.path / "settings.json"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}; choose another folder") from error
        with FileLock(self._locks / "settings.lock"):
            before = self.read_json(file) if file.is_file() else {}
            self.check_same(
                before,
                {key: value for key, value in settings.items() if key in before},
                holds="runs",
                advice="use the settings it began with, or another folder",
            )
            if set(settings) - set(before):
                self.write_json(file, {**before, **settings}, indent=1)

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Yield whether this process alone may work on ``name`` until the end of the block."""
        lock = FileLock(self._locks / f"{name}.lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


class CompareFolder(SharedFolder):
    """The folder of a comparison: also ``cells/NAME.json`` (outcome of a run) and ``runs/NAME/`` (its run folder)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cells, self.runs = path / "cells", path / "runs"
        self._known: dict[Path, Outcome] = {}

    def done(self) -> dict[Cell, Outcome]:
        """The outcomes of the finished runs, by cell; each file is read once."""
        for file in sorted(self.cells.glob("*.json")):
            if file not in self._known and (outcome := _outcome(file)) is not None:
                self._known[file] = outcome
        return {outcome.cell: outcome for outcome in self._known.values()}

    def has(self, cell: Cell) -> bool:
        """Whether ``cell`` is done."""
        file = self._file(cell)
        return file in self._known or (file.is_file() and _outcome(file) is not None)

    def keep(self, outcome: Outcome) -> None:
        """Write the outcome of a run, whole or not at all."""
        write_text(self._file(outcome.cell), outcome.model_dump_json(indent=1) + "\n")

    def run(self, cell: Cell) -> Path:
        """The run folder of ``cell``."""
        return self.runs / cell.name

    def _file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"


def _outcome(file: Path) -> Outcome | None:
    """The outcome in ``file``; None if the file is damaged, then the run, which is in its own folder, is read again."""
    try:
        return Outcome.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return None
        place = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{file} is not an outcome that this version of zoft can read ({place}: {first['msg']}); delete it, and "
            "the run is repeated"
        ) from error
