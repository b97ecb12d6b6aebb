"""Displacement: how far training moved every layer, ``|theta_t - theta_0|`` (arXiv 2502.03304, figure 2).

First-order training moves layers by very different distances, isotropic zeroth-order training all by a similar one.
Logged with ``log_displacement`` at every dev evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoft.deploy.journal import read_journal
from zoft.errors import ConfigError, RunError
from zoft.files import replacing
from zoft.optim.core.anchored import length_of
from zoft.weights.blocks import Block, layer_of


class Start:
    """A copy of the base's weights, to measure displacement from; as large as the weights."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._weights = {block.name: block.parameter.detach().clone() for block in blocks}

    def lengths(self, blocks: Sequence[Block]) -> dict[str, float]:
        """Return ``|theta - theta_0|`` of every block by name; sums in float64."""
        return {block.name: length_of(block, self._weights[block.name]) for block in blocks}


@dataclass(frozen=True)
class Displacement:
    """Displacements that a run logged: for each step, the length by layer number."""

    run: Path
    method: str
    steps: dict[int, dict[int, float]]


def displacement(run: Path, only: str = "") -> Displacement:
    """Return the displacements that ``run`` logged, of the blocks in numbered layers whose name contains ``only``.

    Raises:
        RunError: the run did not log it, or no block has such a name.
    """
    contents = read_journal(run / "journal" if run.is_dir() else run)
    logged = {line.step: line.displacement for line in contents.evaluations if line.displacement}
    if contents.header is None or not logged:
        raise RunError(f"{run} logged no displacement; train it with --set log_displacement=true and a dev split")
    steps = {step: layer_lengths(lengths, only) for step, lengths in logged.items()}
    if not any(steps.values()):
        raise RunError(f"{run} has no block in a numbered layer with {only!r} in its name")
    return Displacement(run, str(contents.header.config.get("method")), steps)


def layer_lengths(lengths: Mapping[str, float], only: str = "") -> dict[int, float]:
    """Combine the lengths of the blocks of a layer: the root of the sum of squares, by layer number.

    >>> layer_lengths({"h.0.q.weight": 3.0, "h.0.v.weight": 4.0, "norm.weight": 1.0})
    {0: 5.0}
    """
    squares: dict[int, float] = {}
    for name, length in lengths.items():
        layer = layer_of(name)
        if layer is not None and only in name:
            squares[int(layer)] = squares.get(int(layer), 0.0) + length**2
    return {layer: square**0.5 for layer, square in sorted(squares.items())}


def draw(displacements: Sequence[Displacement], path: Path) -> None:
    """Write a picture: a panel per run with a line per evaluation over the layers, later ones darker.

    `ConfigError` without matplotlib, which the extra ``plot`` installs.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'zoft[plot]'; --json needs nothing") from error
    figure = Figure(figsize=(4 * len(displacements), 3.6), layout="constrained")
    panels = figure.subplots(1, len(displacements), squeeze=False)[0]
    for panel, found in zip(panels, displacements, strict=True):
        steps = [step for step in sorted(found.steps) if step > 0]
        for number, step in enumerate(steps, start=1):
            layers = found.steps[step]
            panel.plot(
                list(layers), list(layers.values()), color=str(0.85 * (1 - number / len(steps))), label=f"{step}"
            )
        panel.set(title=f"{found.method}: {found.run.name}", xlabel="layer")
        panel.set_ylim(bottom=0)
        panel.legend(title="step", fontsize="x-small")
    panels[0].set_ylabel("|theta - theta_0|")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
