"""The folder of a comparison: what it was begun with, its cells, and who is at work on what."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.transfer.plan import Cell, Outcome
from zoft.files import write_text


class Folder:
    """``settings.json``, ``cells/NAME.json``, ``tuners/``, ``locks/``; several processes may share it.

    A lock is the operating system's: that of a process that was killed is free again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells, self.tuners, self._locks = path / "cells", path / "tuners", path / "locks"

    def open(self, settings: dict[str, Any]) -> None:
        """Begin with ``settings``, or go on; runs under other settings cannot be compared with these."""
        for part in (self.cells, self.tuners, self._locks):
            part.mkdir(parents=True, exist_ok=True)
        file = self.path / "settings.json"
        with FileLock(self._locks / "settings.lock"):
            if not file.is_file():
                write_text(file, json.dumps(settings, indent=1) + "\n")
        before = json.loads(file.read_text(encoding="utf-8"))
        if different := [f"{key}: {before.get(key)!r} there" for key in settings if before.get(key) != settings[key]]:
            raise SystemExit(
                f"{self.path} holds runs with other settings ({'; '.join(different)}); take another --work"
            )

    def done(self) -> dict[Cell, Outcome]:
        """The outcomes that are there."""
        outcomes = [Outcome.from_json(file.read_text(encoding="utf-8")) for file in sorted(self.cells.glob("*.json"))]
        return {outcome.cell: outcome for outcome in outcomes}

    def has(self, cell: Cell) -> bool:
        """Whether ``cell`` is done."""
        return self._file(cell).is_file()

    def keep(self, outcome: Outcome) -> None:
        """Write an outcome, whole or not at all."""
        write_text(self._file(outcome.cell), outcome.to_json() + "\n")

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

    def _file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"
