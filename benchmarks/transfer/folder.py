"""The folder of a comparison: cells and tuners, shared by several processes."""

from pathlib import Path

from benchmarks.transfer.plan import Cell, Outcome
from zoft.compare.folder import SharedFolder
from zoft.files import write_text


class Folder(SharedFolder):
    """``cells/NAME.json`` and ``tuners/`` beside ``settings.json`` and ``locks/``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.cells, self.tuners = path / "cells", path / "tuners"

    def done(self) -> dict[Cell, Outcome]:
        """Return the outcomes of the finished cells."""
        outcomes = [Outcome.from_json(file.read_text(encoding="utf-8")) for file in sorted(self.cells.glob("*.json"))]
        return {outcome.cell: outcome for outcome in outcomes}

    def has(self, cell: Cell) -> bool:
        """Whether ``cell`` is done."""
        return self._file(cell).is_file()

    def keep(self, outcome: Outcome) -> None:
        """Write an outcome, whole or not at all."""
        write_text(self._file(outcome.cell), outcome.to_json() + "\n")

    def _file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.name}.json"
