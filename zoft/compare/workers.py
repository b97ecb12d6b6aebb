"""Further processes that work on the runs of one comparison, and the events they send."""

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from zoft.compare.cells import CellDone, CellFailed, CellStarted, CompareEvent, CompareListener
from zoft.compare.comparison import Comparison
from zoft.compare.folder import CompareFolder
from zoft.compare.work import Work
from zoft.errors import Interrupted, ZoftError
from zoft.events import Warned

POLL = 0.2  # seconds
_SENT = (CellStarted, CellDone, CellFailed, Warned)  # not steps: those of several runs at once are unreadable


class Workers:
    """``count`` processes that work on the runs beside this one, with equal shares of its threads; a context manager.

    They stop, with everything saved, when the ``with`` block raises or when this process dies.
    """

    def __init__(self, comparison: Comparison, count: int, on_event: CompareListener) -> None:
        context = multiprocessing.get_context("spawn")
        self._on_event = on_event
        self._events: Any = context.Queue()
        self._stop = context.Event()
        self._threads = torch.get_num_threads()
        self._share = max(1, self._threads // (count + 1))
        arguments = (comparison, self._share, self._events, self._stop, os.getpid())
        self._processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]

    def __enter__(self) -> Self:
        if self._processes:
            torch.set_num_threads(self._share)
        for process in self._processes:
            process.start()
        return self

    def listen(self) -> None:
        """Pass on the events that the other processes have sent so far."""
        while self._processes:
            try:
                self._on_event(self._events.get_nowait())
            except queue.Empty:
                return

    def join(self, cancelled: Callable[[], bool]) -> None:
        """Wait for the other processes to finish their runs, or stop them once ``cancelled`` returns true."""
        while any(process.is_alive() for process in self._processes):
            if cancelled():
                self._stop.set()
            self.listen()
            time.sleep(POLL)
        self.listen()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        if kind is not None:
            self._stop.set()
            if issubclass(kind, Exception):
                self.join(lambda: True)
            else:  # Ctrl-C a second time: at once
                for process in self._processes:
                    process.terminate()


def _work(comparison: Comparison, threads: int, events: Any, stop: Any, parent: int) -> None:
    """The main function of such a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the first process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the first process ends this one at once
    torch.set_num_threads(threads)

    def send(event: CompareEvent) -> None:
        if isinstance(event, _SENT):
            events.put(event)

    folder = CompareFolder(comparison.config.out)
    work = Work(comparison, folder, send, lambda: stop.is_set() or os.getppid() != parent)
    try:
        work.go_on()
    except Interrupted:
        return
    except ZoftError as error:
        events.put(Warned(f"a process of the comparison gave up: {error}"))
