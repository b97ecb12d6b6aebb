"""Draw loss over forward passes, as lines of text or as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from zoft.errors import ConfigError
from zoft.files import replacing

Curve = Sequence[tuple[int, float]]  # (forwards, loss)
_WIDTH = 40


def draw_text(curves: Mapping[str, Curve]) -> str:
    """Return a bar for every point of every curve; a full bar is the highest loss.

    >>> print(draw_text({"mezo": [(0, 1.0), (40, 0.5)], "zoft": [(0, 1.0), (40, 0.25)]}))
     0  mezo  ████████████████████████████████████████ 1.0000
     0  zoft  ████████████████████████████████████████ 1.0000
    40  mezo  ████████████████████ 0.5000
    40  zoft  ██████████ 0.2500
    """
    points = [(forwards, name, loss) for name, curve in curves.items() for forwards, loss in curve]
    highest = max(loss for _, _, loss in points)
    digits, width = len(str(max(forwards for forwards, _, _ in points))), max(map(len, curves))
    order = list(curves)
    points.sort(key=lambda point: (point[0], order.index(point[1])))
    return "\n".join(
        f"{forwards:>{digits}}  {name:<{width}}  {'█' * round(loss / highest * _WIDTH)} {loss:.4f}"
        for forwards, name, loss in points
    )


def draw_png(curves: Mapping[str, Curve], path: Path, *, title: str) -> None:
    """Write the curves as a picture; `ConfigError` without matplotlib, which the extra ``plot`` installs."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'zoft[plot]'; the text needs nothing") from error
    figure = Figure(figsize=(7, 4), layout="constrained")  # no pyplot: no global state, no window
    axes = figure.add_subplot()
    axes.set(xlabel="forward passes", ylabel="dev loss", title=title)
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", label=name)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
