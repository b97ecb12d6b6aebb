"""A folder that several processes work in: what it was begun with, what is done, and who is at work on what."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from zoft.compare.cells import Cell, Outcome
from zoft.errors import RunError
from zoft.files import write_text


class SharedFolder:
    """``settings.json`` and ``locks/`` of a folder that several processes may share.

    A lock is the operating system's: that of a process that was killed is free again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks = path / "locks"

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin with ``settings``, or go on and add those that are new; work under others cannot be compared with this.

        Raises:
            RunError: the folder was begun with other values, or cannot be written.
        """
        file = self.path / "settings.json"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}; choose another folder") from error
        with FileLock(self._locks / "settings.lock"):
            before = _read(file) if file.is_file() else {}
            if different := [
                f"{key} is {before[key]!r} there, {value!r} here"
                for key, value in settings.items()
                if key in before and before[key] != value
            ]:
                raise RunError(
                    f"{self.path} holds runs with other settings ({'; '.join(different)}); take the settings it began "
                    "with, or another folder"
                )
            if set(settings) - set(before):
                write_text(file, json.dumps({**before, **settings}, indent=1) + "\n")

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
    """``cells/NAME.json`` (what came of a run) and ``runs/NAME/`` (its run folder) beside what `SharedFolder` has."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cells, self.runs = path / "cells", path / "runs"
        self._known: dict[Path, Outcome] = {}

    def done(self) -> dict[Cell, Outcome]:
        """The outcomes that are there; a file is read once."""
        for file in sorted(self.cells.glob("*.json")):
            if file not in self._known:
                self._known[file] = _outcome(file)
        return {outcome.cell: outcome for outcome in self._known.values()}

    def has(self, cell: Cell) -> bool:
        """Whether ``cell`` is done."""
        return self._file(cell).is_file()

    def keep(self, outcome: Outcome) -> None:
        """Write an outcome, whole or not at all."""
        write_text(self._file(outcome.cell), outcome.model_dump_json(indent=1) + "\n")

    def run(self, cell: Cell) -> Path:
        """The run folder of ``cell``."""
        return self.runs / cell.name

    def _file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{file} is no JSON object ({error}); restore it from a copy, or take another folder") from error


def _outcome(file: Path) -> Outcome:
    try:
        return Outcome.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{file} is no outcome of this version of zoft ({place}: {first['msg']}); delete it, and the run is made "
            "again"
        ) from error
