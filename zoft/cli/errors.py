"""Error messages: the one message that the user reads for an exception, with what to try next."""

import errno
import sys

from zoft.errors import ZoftError


def explain(error: BaseException) -> str | None:
    """Return the message for an error that the user can fix, None for a bug in zoft.

    >>> explain(ZoftError("no task 'sts2'; did you mean sst2?"))
    "no task 'sts2'; did you mean sst2?"
    """
    if isinstance(error, ZoftError):
        return str(error)
    if isinstance(error, MemoryError) or _is_accelerator_out_of_memory(error):
        return "out of memory; try a smaller --batch-size, more micro-batches (--accumulate) or --dtype bf16"
    if isinstance(error, OSError) and error.filename is not None and error.errno != errno.EPIPE:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the free space"
    return None


def _is_accelerator_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # an error of torch exists only where torch is loaded
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
