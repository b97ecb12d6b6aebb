"""Measure the memory of a run: its peak and its average."""

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from zoft import memory

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
INTERVAL = 0.1  # seconds between two readings


class Meter:
    """Context manager that measures memory: resident memory of the process on a CPU, torch's allocations on a GPU.

    ``peak`` and ``mean`` are bytes and include the program itself. Runs follow one another in a process, so the
    system's record of the peak is reset first; where that is impossible (outside Linux), ``peak`` is that of the
    process so far and ``mean`` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._over = threading.Event()
        self._sum, self._count, self._most = 0, 0, 0
        self.peak, self.mean = 0, None

    mean: int | None

    def __enter__(self) -> Self:
        memory.release()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        elif _CLEAR.exists():
            _CLEAR.write_text("5")  # sets VmHWM to what is resident now
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.peak = max(self._peak(), self._most)  # the system's counters lag behind one another by a page or two
        self.mean = self._sum // self._count if self._count else None

    def _watch(self) -> None:
        while True:
            now = self._now()
            if now is not None:
                self._sum, self._count, self._most = self._sum + now, self._count + 1, max(self._most, now)
            if self._over.wait(INTERVAL):
                return

    def _now(self) -> int | None:
        return torch.cuda.memory_allocated(self._cuda) if self._cuda else _status("VmRSS")

    def _peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._cuda)
        found = _status("VmHWM")
        if found is not None:
            return found
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(name: str) -> int | None:
    """An entry of ``/proc/self/status`` in bytes; None if the file does not exist."""
    if not _STATUS.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
