"""The plots of a comparison as SVG (the ``plot`` extra): loss over forwards, over time, and over the learning rate."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from zoft.compare.summary import Row

COLUMNS = 3
_WIDTH, _HEIGHT = 4.4, 3.1  # inches of a panel
_IN_PANELS = 6  # methods that a panel's legend has room for

Style = dict[str, Any]
Draw = Callable[[Any, Row, Style], None]


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def loss_over_forwards(rows: Sequence[Row]) -> str:
    """Return an SVG of dev loss over forward passes at the best rate, a panel for each model and task."""
    return _panels(rows, lambda axes, row, style: _curve(axes, row, style, "forwards"), "forward passes")


def loss_over_time(rows: Sequence[Row]) -> str:
    """Return an SVG of dev loss over the seconds of the run, evaluations included."""
    return _panels(rows, lambda axes, row, style: _curve(axes, row, style, "seconds"), "seconds")


def loss_over_rate(rows: Sequence[Row]) -> str:
    """Return an SVG of dev loss of the kept weights over the learning rate; a cross on top marks divergence."""

    def draw(axes: Any, row: Row, style: Style) -> None:
        good = [(one.lr, one.loss) for one in row.rates if math.isfinite(one.loss)]
        if good:
            axes.plot(*zip(*good, strict=True), marker="o", markersize=4, label=row.method, **style)
        lost = [one.lr for one in row.rates if not math.isfinite(one.loss)]
        if lost:
            label = None if good else row.method
            top = axes.get_xaxis_transform()
            axes.plot(lost, [0.97] * len(lost), "x", color=style["color"], transform=top, label=label)
        axes.set_xscale("log")

    return _panels(rows, draw, "learning rate")


def _curve(axes: Any, row: Row, style: Style, across: str) -> None:
    points = [point for point in row.curve if math.isfinite(point.loss)]
    if points:
        label = f"{row.method} ({row.lr:.2g})"
        xs, ys = [getattr(point, across) for point in points], [point.loss for point in points]
        axes.plot(xs, ys, marker=".", label=label, **style)


def style_of(number: int) -> Style:
    """Return the line style of method ``number``: ten colours, then the same dashed and dotted.

    >>> style_of(0), style_of(12)
    ({'color': 'C0', 'linestyle': '-'}, {'color': 'C2', 'linestyle': '--'})
    """
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def _panels(rows: Sequence[Row], draw: Draw, across: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    drawn = [row for row in rows if row.lr is not None]
    places = list(dict.fromkeys(row.place for row in drawn))
    methods = list(dict.fromkeys(row.method for row in drawn))
    columns = min(COLUMNS, max(1, len(places)))
    lines = math.ceil(len(places) / columns) or 1
    figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * lines), layout="constrained")  # no pyplot: no global state
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, place in zip(panels, places, strict=False):
        for row in drawn:
            if row.place == place:
                draw(axes, row, style_of(methods.index(row.method)))
        axes.set(title=place, xlabel=across, ylabel="dev loss")
        axes.grid(alpha=0.25)
        if len(methods) <= _IN_PANELS and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    for axes in figure.axes[len(places) :]:
        axes.remove()
    if len(methods) > _IN_PANELS:
        lines_of = [Line2D([], [], marker=".", label=name, **style_of(i)) for i, name in enumerate(methods)]
        figure.legend(handles=lines_of, loc="outside lower center", ncols=2 * columns, fontsize="small")
    target = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": across}):  # text as text; the same file every time
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()
