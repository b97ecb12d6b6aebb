"""Ctrl-C and SIGTERM: the first one stops a run after it is saved, the second at once."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from zoft.cli.output import Output

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 0.02  # seconds until an interrupt that was swallowed is raised again


@contextmanager
def stopping(output: Output, can_save: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Yield the ``cancelled`` function that a run polls; Ctrl-C and SIGTERM make it return True.

    While there is nothing to save (``can_save`` returns False) and at the second signal, `KeyboardInterrupt` is raised
    as usual; ``cancelled`` returns True then, too, in case that it is swallowed. A process that was started with a
    signal ignored, as in the background of a script, keeps ignoring it.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        again, asked = asked, True
        if again or not can_save():
            raise KeyboardInterrupt
        output.note("stopping after this step; progress will be saved (Ctrl-C again: stop at once)")

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        with _raised_again():
            yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def terminate_as_interrupt() -> None:
    """Let SIGTERM raise `KeyboardInterrupt`, as Ctrl-C does, unless the process was started with it ignored."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        with contextlib.suppress(ValueError):  # not in the main thread: the program around decides
            signal.signal(signal.SIGTERM, handle)


@contextmanager
def _raised_again() -> Iterator[None]:
    """Raise `KeyboardInterrupt` again where Python can only report it: in ``__del__`` and in some callbacks."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            timer = threading.Timer(_AGAIN, _thread.interrupt_main)  # not now: it would be swallowed again
            timer.daemon = True
            timer.start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
