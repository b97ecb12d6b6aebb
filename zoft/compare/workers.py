"""Further processes that work on the runs of one comparison, and what they tell."""

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from zoft.compare.cells import CellDone, CellFailed, CellStarted, CompareEvent
from zoft.compare.config import CompareConfig
from zoft.compare.folder import CompareFolder
from zoft.errors import Interrupted, ZoftError
from zoft.events import Warned

POLL = 0.2  # seconds
_TOLD = (CellStarted, CellDone, CellFailed, Warned)  # the steps of several runs at once say nothing to a reader


class Workers:
    """``count`` processes beside this one, each at the runs of ``config``; the threads of this process are shared out.

    They stop, with everything saved, when the ``with`` is left by an exception or when this process dies.
    """

    def __init__(self, config: CompareConfig, count: int, on_event: Callable[[CompareEvent], None]) -> None:
        context = multiprocessing.get_context("spawn")
        self._on_event = on_event
        self._told: Any = context.Queue()
        self._stop = context.Event()
        self._threads = torch.get_num_threads()
        self._share = max(1, self._threads // (count + 1))
        arguments = (config, self._share, self._told, self._stop, os.getpid())
        self._processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]

    def __enter__(self) -> Self:
        if self._processes:
            torch.set_num_threads(self._share)
        for process in self._processes:
            process.start()
        return self

    def listen(self) -> None:
        """Pass on what the others have told so far."""
        while self._processes:
            try:
                self._on_event(self._told.get_nowait())
            except queue.Empty:
                return

    def join(self, cancelled: Callable[[], bool]) -> None:
        """Wait for the others, which finish the runs that they hold, or stop where ``cancelled`` says so."""
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


def _work(config: CompareConfig, threads: int, told: Any, stop: Any, parent: int) -> None:
    """What such a process does."""
    from zoft.compare.run import Work  # it starts these processes itself

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the first process decides
    torch.set_num_threads(threads)

    def tell(event: CompareEvent) -> None:
        if isinstance(event, _TOLD):
            told.put(event)

    work = Work(config, CompareFolder(config.out), tell, lambda: stop.is_set() or os.getppid() != parent)
    try:
        work.go_on()
    except Interrupted:
        return
    except ZoftError as error:
        told.put(Warned(f"a process of the comparison gave up: {error}"))
