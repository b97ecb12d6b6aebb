"""Deadline: one time limit for several calls that may hang, whatever the server does."""

import contextvars
import math
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import huggingface_hub

from zoft.errors import ConfigError, shown
from zoft.registry.hub.client import ENDS, UnreachableError

T = TypeVar("T")

AUTO_SECONDS = 15.0  # for everything that ``auto`` asks of servers
VARIABLE = "ZOFT_AUTO_SECONDS"


def auto_seconds() -> float:
    """Return the seconds that the search for a card may take: ``ZOFT_AUTO_SECONDS``, by default 15."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return AUTO_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"{VARIABLE} is {shown(text)}, expected seconds such as 15; 0 asks no server")
    return seconds


class Deadline:
    """A time limit that begins when it is made; `run` returns when it is over at the latest.

    Functions run in a thread that is left behind when the time is over. Timeouts of requests cannot do this: a server
    that sends a byte now and then never reaches them. The Hub's connections are closed then, which ends the thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def run(self, what: str, function: Callable[[], T]) -> T:
        """Return ``function()`` or raise what it raises; `UnreachableError`, which names ``what``, if time is over."""
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            ENDS.set(self._end)
            try:
                results.append(function())
            except BaseException as error:  # raised again below, by the thread that waits
                errors.append(error)

        left = self._end - time.monotonic()
        if left > 0:
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
            thread.start()
            thread.join(left)
            if errors:
                raise errors[0]
            if results:
                return results[0]
            huggingface_hub.close_session()
        raise UnreachableError(f"{what}: no whole answer within {self.seconds:g} s ({VARIABLE} sets the limit)")
