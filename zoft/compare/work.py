"""Carry out the runs of a comparison in one process; other processes may share its folder."""

import time
from collections.abc import Callable

from zoft.compare.cells import Cell, CellDone, CellFailed, CellStarted, CompareListener, all_cells
from zoft.compare.comparison import Comparison
from zoft.compare.folder import CompareFolder
from zoft.compare.runner import Runner
from zoft.errors import Interrupted, ZoftError

WAIT = 1.0  # seconds, while other processes hold all remaining runs


class Work:
    """Carries out run after run, skipping those that other processes hold, until none is left."""

    def __init__(
        self,
        comparison: Comparison,
        folder: CompareFolder,
        on_event: CompareListener,
        cancelled: Callable[[], bool],
    ) -> None:
        self._comparison, self._folder = comparison, folder
        self._on_event, self._cancelled = on_event, cancelled
        self._runner = Runner(comparison.config, folder, on_event, cancelled)
        self.failed: dict[Cell, str] = {}

    def go_on(self, between: Callable[[], None] = lambda: None) -> None:
        """Carry out the remaining runs; ``between`` is called before each round of them."""
        while left := [cell for cell in self._left() if cell not in self.failed]:
            between()
            if not any(self._attempt(cell) for cell in left):
                self._stop_if_asked()
                time.sleep(WAIT)

    def _left(self) -> list[Cell]:
        done = self._folder.done()
        return [cell for cell in all_cells(self._comparison, done) if cell not in done]

    def _attempt(self, cell: Cell) -> bool:
        """Carry out the run of ``cell`` unless another process has it; return whether the plan may have changed."""
        self._stop_if_asked()
        with self._folder.claimed(cell.name) as ours:
            if not ours or self._folder.has(cell):
                return False
            self._on_event(CellStarted(cell, *self._counts()))
            try:
                outcome = self._runner.run(cell)
            except Interrupted as stopped:
                raise self._interrupted() from stopped
            except ZoftError as error:
                self.failed[cell] = str(error)
                self._on_event(CellFailed(cell, str(error)))
                return True
            self._folder.keep(outcome)
        self._on_event(CellDone(outcome, *self._counts()))
        return True

    def _counts(self) -> tuple[int, int]:
        """How many runs are done, and how many are needed so far."""
        done = self._folder.done()
        cells = all_cells(self._comparison, done)
        return sum(cell in done for cell in cells), len(cells)

    def _stop_if_asked(self) -> None:
        if self._cancelled():
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        done, total = self._counts()
        return Interrupted(f"stopped with {done} of {total} runs done; the same command goes on")
