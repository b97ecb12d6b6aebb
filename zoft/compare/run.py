"""Run a comparison in its folder and report on it."""

from collections.abc import Callable

from zoft.compare.cells import CompareListener
from zoft.compare.comparison import Comparison
from zoft.compare.config import CompareConfig
from zoft.compare.folder import CompareFolder
from zoft.compare.report import write_report
from zoft.compare.result import CompareResult
from zoft.compare.work import Work
from zoft.compare.workers import Workers
from zoft.errors import RunError
from zoft.events import silent


def compare(
    config: CompareConfig,
    *,
    jobs: int = 1,
    report_only: bool = False,
    on_event: CompareListener = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> CompareResult:
    """Carry out the missing runs of a comparison, and report on all of them in ``config.out``.

    Called again after a crash it goes on; with more models, tasks, methods, rates or seeds it adds their runs. Any
    number of processes may work in one folder, ``jobs`` of them from this call. Learning rates are chosen on dev, by
    the mean loss over seeds, and their runs are reported on test. With ``report_only`` nothing is run.

    Raises:
        Interrupted: ``cancelled`` returned true; every run is saved.
        RunError: the folder holds another comparison; or some runs failed (the others are reported).
        ZoftError: a model, a card or the folder cannot be used.
    """
    comparison, folder = Comparison.open(config), CompareFolder(config.out)
    folder.open(comparison.settings())
    work = Work(comparison, folder, on_event, cancelled)
    if not report_only:
        with Workers(comparison, jobs - 1, on_event) as workers:
            work.go_on(workers.listen)
            workers.join(cancelled)
    result = write_report(comparison, folder.done(), config.out)
    if failed := work.failed:
        cell, why = next(iter(failed.items()))
        raise RunError(
            f"{len(failed)} of the runs failed; the others are in {result.page}. The first, {cell.name}: {why}"
        )
    return result
