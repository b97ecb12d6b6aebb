"""Giving memory back before more is taken."""

import ctypes
import gc
import sys


def release() -> None:
    """Free what only reference cycles hold, and return freed heap to the system.

    The C library keeps freed memory for itself; what is loaded next into other pages (weights, mapped files) would
    come on top of it. Only glibc can be asked, elsewhere the collection is all.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
