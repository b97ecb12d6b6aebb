"""Dev loss over forward passes, a panel for each task (the ``plot`` extra)."""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.transfer.report import Entry

COLUMNS = 3


def draw(found: Sequence[Entry], file: Path) -> None:
    """Write the curves of every method at its best rate to ``file``."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(entry.task for entry in found))
    methods = list(dict.fromkeys(entry.method for entry in found))
    rows = math.ceil(len(tasks) / COLUMNS)
    figure = Figure(figsize=(4.5 * COLUMNS, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for panel, task in zip(panels, tasks, strict=False):
        for entry in (entry for entry in found if entry.task == task):
            forwards, losses = zip(*entry.curve, strict=True)
            label = f"{entry.method} ({entry.lr:.2g})"
            panel.plot(forwards, losses, marker=".", color=f"C{methods.index(entry.method)}", label=label)
        panel.set(title=task, xlabel="forwards", ylabel="dev loss")
        panel.legend(fontsize="x-small")
    for panel in figure.axes[len(tasks) :]:
        panel.remove()
    figure.savefig(file, dpi=120)
