"""Deadline: run code that came with a checkpoint, such as a chat template, for a limited time."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _Expired(BaseException):
    """Ends the thread of a function that ran too long; no ``except Exception`` catches it."""


def within(seconds: float, function: Callable[[], T]) -> T:
    """Return ``function()``, computed in another thread; its exceptions are raised here.

    Raises:
        TimeoutError: it ran longer than ``seconds``. The thread is ended at its next line of Python.

    >>> within(1.0, lambda: 1 + 1)
    2
    """
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((function(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        # A signal would work in the main thread only, and a process for each row would take seconds.
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Expired))
        raise TimeoutError(f"took more than {seconds:g} seconds")
    value, error = done[0]
    if error is not None:
        raise error
    return value
