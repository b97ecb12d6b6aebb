"""A comparison: what is to be done, doing it beside other processes, and saying what came of it."""

import time
from collections.abc import Callable

from zoft import registry
from zoft.compare.cells import Cell, CellDone, CellFailed, CellStarted, CompareEvent, all_cells
from zoft.compare.config import CompareConfig
from zoft.compare.folder import CompareFolder
from zoft.compare.report import write_report
from zoft.compare.result import CompareResult
from zoft.compare.runner import Runner
from zoft.compare.workers import Workers
from zoft.deploy.choice import AUTO
from zoft.errors import Interrupted, RunError, ZoftError
from zoft.model import fingerprint
from zoft.model.adapters.files import WEIGHTS_FILE
from zoft.model.hashes import file_digest
from zoft.model.load import resolve
from zoft.tasks import get_task
from zoft.tasks.rows import folder_rows, own_rows
from zoft.tasks.types import Split

WAIT = 1.0  # seconds, while other processes hold all that is left

CompareListener = Callable[[CompareEvent], None]


def silent(event: CompareEvent) -> None:
    """Listen to nothing."""


def compare(
    config: CompareConfig,
    *,
    jobs: int = 1,
    report_only: bool = False,
    on_event: CompareListener = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> CompareResult:
    """Make all runs of a comparison, those that are not there yet, and report on them in ``config.out``.

    Called again after a kill it goes on; with more models, tasks, methods, rates or seeds it adds their runs. Any
    number of processes may work in one folder, ``jobs`` of them from this call. Learning rates are chosen on dev, by
    the mean loss over seeds, and their runs reported on test. With ``report_only`` nothing is run.

    Raises:
        Interrupted: ``cancelled`` said so; every run is saved.
        RunError: the folder holds another comparison; or some runs could not be made (the others are reported).
        ZoftError: a model, a card or the folder cannot be used.
    """
    _check_data(config)
    folder = CompareFolder(config.out)
    folder.open(_identity(config))
    work = Work(config, folder, on_event, cancelled)
    if not report_only:
        with Workers(config, jobs - 1, on_event) as workers:
            work.go_on(workers.listen)
            workers.join(cancelled)
    result = write_report(config, folder.done(), config.out)
    if failed := work.failed:
        cell, why = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of the runs could not be made; the others are in {result.page}. The first, "
            f"{cell.name}: {why}"
        )
    return result


class Work:
    """Makes run after run, giving way to other processes in the folder, until none is left."""

    def __init__(
        self,
        config: CompareConfig,
        folder: CompareFolder,
        on_event: CompareListener,
        cancelled: Callable[[], bool],
    ) -> None:
        self.config, self.folder = config, folder
        self._on_event, self._cancelled = on_event, cancelled
        self._runner = Runner(config, folder, on_event, cancelled)
        self.failed: dict[Cell, str] = {}

    def go_on(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Make the runs that are left; ``meanwhile`` is called between them."""
        while left := [cell for cell in self._left() if cell not in self.failed]:
            meanwhile()
            if not any(self._made(cell) for cell in left):
                self._stop_if_asked()
                time.sleep(WAIT)

    def _left(self) -> list[Cell]:
        done = self.folder.done()
        return [cell for cell in all_cells(self.config, done) if cell not in done]

    def _made(self, cell: Cell) -> bool:
        """Make the run of ``cell`` unless another process is at it or has made it; whether plans may have changed."""
        self._stop_if_asked()
        with self.folder.claimed(cell.name) as ours:
            if not ours or self.folder.has(cell):
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
            self.folder.keep(outcome)
        self._on_event(CellDone(outcome, *self._counts()))
        return True

    def _counts(self) -> tuple[int, int]:
        """Runs that are done, and that are needed so far."""
        done = self.folder.done()
        cells = all_cells(self.config, done)
        return sum(cell in done for cell in cells), len(cells)

    def _stop_if_asked(self) -> None:
        if self._cancelled():
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        done, total = self._counts()
        return Interrupted(f"stopped with {done} of {total} runs done; the same command goes on")


def _check_data(config: CompareConfig) -> None:
    """Read a first row of every task that is at hand, so that a wrong path does not wait for a model to be loaded."""
    if config.data is None:
        return
    sizes: dict[Split, int] = {"train": 1}
    if not config.tasks:
        own_rows(config.data, ("train",), sizes)
    for task in config.tasks:
        folder_rows(get_task(task), config.data, ("train",), sizes)


def _weights_of(model: str) -> str:
    """The base hash of a model; of an adapter with the hash of its own weights."""
    found = resolve(model)
    base = fingerprint.base_hash(found.path)
    return base if found.adapter is None else f"{base} {file_digest(found.adapter / WEIGHTS_FILE)}"


def _identity(config: CompareConfig) -> dict[str, object]:
    """What all work in a folder has to agree on; models and methods may be added."""
    found: dict[str, object] = {
        "budget": config.budget,
        "batch_size": config.batch_size,
        "settings": config.model_dump(mode="json")["settings"],
    }
    for model in config.models:
        found[f"model {model.name}"] = _weights_of(model.model)
    for spec in config.methods:
        told = spec.model_dump(mode="json", include={"method", "settings", "demonstrations"})
        if spec.tuner not in (None, AUTO):
            told["tuner"] = registry.open_card(str(spec.tuner)).digest
        found[f"method {spec.label}"] = told
    return found
