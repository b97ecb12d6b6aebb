"""Ctrl-C: the first one stops a run after it is saved, the second at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from zoft.cli.output import Output


@contextmanager
def stopping(output: Output, can_save: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Yield the ``cancelled`` function that a run polls; Ctrl-C makes it return True.

    While there is nothing to save (``can_save`` returns False) and at the second Ctrl-C, `KeyboardInterrupt` is raised
    as usual. A process that was started with Ctrl-C ignored, as in the background of a script, keeps ignoring it.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not can_save():
            raise KeyboardInterrupt
        asked = True
        output.note("stopping after this step; progress will be saved (Ctrl-C again: stop at once)")

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
