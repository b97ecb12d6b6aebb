"""Pictures of a tuner's scales, one curve over depth for each kind of block: lines of text, or a PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoft.errors import ConfigError
from zoft.files import replacing
from zoft.tuner.networks import group_of

_STYLES = (("-", ".", "D"), ("--", "x", "s"), (":", "+", "^"))  # of lines, a round of ten colours each
_BARS = "▁▂▃▄▅▆▇█"
_SMALLEST = 1e-6  # of a scale on a logarithmic axis; the form |MLP| can reach 0


@dataclass(frozen=True)
class Curve:
    """The scales of one kind of block: ``depths`` are layer numbers, or a single None outside of layers."""

    label: str
    depths: tuple[int | None, ...]
    scales: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Geometric mean."""
        return _geometric_mean(self.scales)


def curves(names: Sequence[str], scales: Sequence[float]) -> list[Curve]:
    """Return one curve a kind of block, in the order of ``names``; several blocks of a kind in a layer are averaged.

    >>> curves(["layers.0.v.weight", "layers.1.v.weight", "norm.weight"], [1.0, 2.0, 3.0])[0]
    Curve(label='v', depths=(0, 1), scales=(1.0, 2.0))
    """
    kinds: dict[str, dict[int | None, list[float]]] = {}
    for name, scale in zip(names, scales, strict=True):
        by_depth = kinds.setdefault(group_of(name, "kind"), {})
        by_depth.setdefault(_depth(name), []).append(max(float(scale), _SMALLEST))
    return [
        Curve(_label(kind), tuple(by_depth), tuple(_geometric_mean(values) for values in by_depth.values()))
        for kind, by_depth in kinds.items()
    ]


def draw_text(names: Sequence[str], scales: Sequence[float]) -> str:
    """Return a line of text for every kind of block: geometric mean, and bars over depth on one logarithmic scale.

    >>> print(draw_text(["layers.0.v.weight", "layers.1.v.weight", "norm.weight"], [0.5, 2.0, 1.0]))
    scales from 0.5 (▁) to 2 (█)
    v     1.000  ▁█
    norm  1.000  ▅
    """
    drawn = curves(names, scales)
    low, high = _range(drawn)
    width = max(len(curve.label) for curve in drawn)
    lines = [f"scales from {low:.3g} (▁) to {high:.3g} (█)" if low < high else f"every scale is {low:.3g}"]
    for curve in drawn:
        bars = "".join(_bar(scale, low, high) for scale in curve.scales)
        lines.append(f"{curve.label:<{width}}  {curve.mean:.3f}  {bars}")
    return "\n".join(lines)


def draw_png(names: Sequence[str], scales: Sequence[float], path: Path) -> None:
    """Write the scales as a PNG: one line over layers for each kind of block, single blocks as dots beside them.

    `ConfigError` without matplotlib, which the extra ``plot`` installs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'zoft[plot]'") from error
    drawn = curves(names, scales)
    figure = Figure(figsize=(9, 5), layout="constrained")  # no pyplot: no global state, no window
    axes = figure.add_subplot()
    axes.set(xlabel="layer", ylabel="scale s")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(1, color="0.7", linewidth=1)
    for i, curve in enumerate(drawn):
        depths = [-1 if depth is None else depth for depth in curve.depths]
        line, dot, single = _STYLES[i // 10 % len(_STYLES)]
        marker = dot if len(depths) > 1 else single
        axes.plot(depths, curve.scales, line, marker=marker, color=f"C{i % 10}", label=curve.label)
    figure.legend(loc="outside right upper", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _depth(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _label(kind: str) -> str:
    """Short name of a kind: without the path to its layer, and without ``.weight``, which most blocks have."""
    return kind.partition(".*.")[2].removesuffix(".weight") or kind.removesuffix(".weight")


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _range(drawn: Sequence[Curve]) -> tuple[float, float]:
    every = [scale for curve in drawn for scale in curve.scales]
    return min(every), max(every)


def _bar(scale: float, low: float, high: float) -> str:
    if low == high:
        return _BARS[3]
    return _BARS[round((math.log(scale) - math.log(low)) / (math.log(high) - math.log(low)) * (len(_BARS) - 1))]
