"""Write the report of a comparison: ``compare.json``, ``.md``, ``.html``, ``rows.csv`` and ``runs.csv``."""

import csv
import io
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

import zoft
from zoft.compare import pictures, tables
from zoft.compare.cells import Done, Outcome, all_cells
from zoft.compare.comparison import Comparison
from zoft.compare.config import CompareConfig
from zoft.compare.page import PictureSection, TableSection, page
from zoft.compare.result import CompareResult
from zoft.compare.statistics import Estimate, duel, firsts
from zoft.compare.summary import Row, rows_of, scores_by
from zoft.errors import RunError
from zoft.files import write_text

NOTES = (
    "A forward is one evaluation of the training objective on one batch; a backward pass counts two more. Evaluations "
    "on dev and test are not counted, and are in the time.",
    "The learning rate is chosen on dev, by the mean loss over seeds of the weights that were kept (the best on dev of "
    "each run). 'edge': no larger or no smaller rate was tried, so a better one may exist.",
    "Scores: mean ± sample standard deviation over seeds [Student's 95 % interval of the mean]; one seed has neither.",
    "Wins count zeroth-order methods only: first-order bounds and baselines stand beside them. Ties count for both.",
    "all forwards: those of every rate and seed of the row. meta-training: forward passes that the tuner was learned "
    "with, once for its base model.",
    "Memory is that of the whole process (on a GPU: what torch allocated): the largest of the seeds, and the average "
    "over the run.",
)


def write_report(comparison: Comparison, done: Done, out: Path) -> CompareResult:
    """Write the report on the finished runs to ``out``, and return the result.

    Raises:
        RunError: runs of one model, task and seed were made on different rows.
    """
    config = comparison.config
    cells = all_cells(comparison, done)
    runs = [done[cell] for cell in cells if cell in done]
    _check_same_rows(runs)
    rows = rows_of(comparison, done)
    result = CompareResult(
        budget=config.budget,
        batch_size=config.batch_size,
        seeds=config.seeds,
        done=len(runs),
        total=len(cells),
        rows=tuple(plain(_flat(row) | {"curve": row.curve, "rates": row.rates}) for row in rows),
        wins=_wins(rows),
        out=out,
        page=out / "compare.html",
        table=out / "compare.md",
    )
    given = config.model_dump(mode="json", exclude_defaults=True, exclude={"out"})
    everything = result.public() | {
        "config": given,
        "machine": machine(),
        "runs": [plain(run.model_dump()) for run in runs],
    }
    write_text(out / "compare.json", json.dumps(plain(everything), indent=1) + "\n")
    write_text(out / "rows.csv", _csv([_flat(row) for row in rows]))
    write_text(out / "runs.csv", _csv([_run(run) for run in runs]))
    write_text(result.table, _markdown(config, rows, result))
    write_text(result.page, _page(config, rows, result, yaml.safe_dump(given, sort_keys=False)))
    return result


def machine() -> dict[str, Any]:
    """Return the device and the versions of this process, by name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {"zoft": zoft.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"device": device, "threads": torch.get_num_threads()} | versions


def plain(value: Any) -> Any:
    """Return ``value`` as JSON values; numbers that are not finite are None.

    >>> plain({"a": (1.0, math.inf)})
    {'a': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_same_rows(runs: Sequence[Outcome]) -> None:
    seen: dict[tuple[str, str, int], Outcome] = {}
    for run in runs:
        if run.data_hash is None:
            continue
        cell = run.cell
        first = seen.setdefault((cell.model, cell.task, cell.seed), run)
        if first.data_hash != run.data_hash:
            raise RunError(
                f"{first.cell.name} and {cell.name} were made with different train or dev rows, so they cannot be "
                "compared; restore the rows they began with, or delete one group of runs"
            )


def _flat(row: Row) -> dict[str, Any]:
    """A row as columns: without its curve, each estimate as three columns."""
    found: dict[str, Any] = {}
    for key, value in row.__dict__.items():
        if key in ("curve", "rates"):
            continue
        if key in ("loss", "metric"):
            one = value or Estimate(math.nan, None, None, 0)
            found |= {key: one.mean, f"{key}_spread": one.spread, f"{key}_half_interval": one.half}
        else:
            found[key] = value
    return found


def _run(run: Outcome) -> dict[str, Any]:
    values = run.model_dump(exclude={"cell", "curve"})
    return asdict(run.cell) | values


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    target = io.StringIO()
    if rows:
        writer = csv.DictWriter(target, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: plain(value) for key, value in row.items()} for row in rows)
    return target.getvalue()


def _wins(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """By loss and by metric: on how many places each method is the best, and its duels with the others."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for what in tables.WHATS:
        scores = scores_by(rows, what)
        best = firsts(scores)
        found[what] = {
            method: {
                "first": best[method][0],
                "of": best[method][1],
                "against": {other: duel(scores, method, other) for other in scores if other != method},
            }
            for method in scores
        }
    return found


def _subtitle(config: CompareConfig, result: CompareResult) -> str:
    seeds = f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}"
    return (
        f"{config.budget:,} forward passes of {config.batch_size} examples a run, {seeds}; {result.done} of "
        f"{result.total} runs done; zoft {zoft.__version__}"
    )


def _markdown(config: CompareConfig, rows: Sequence[Row], result: CompareResult) -> str:
    parts = [
        _subtitle(config, result),
        tables.markdown(tables.scores_table(rows)),
        tables.markdown(tables.wins_table(rows)),
        "Wins of the line against the column, by loss · by metric:",
        tables.markdown(tables.duels_table(rows)),
        "\n".join(f"- {note}" for note in NOTES),
    ]
    return "\n\n".join(parts) + "\n"


def _page(config: CompareConfig, rows: Sequence[Row], result: CompareResult, configuration: str) -> str:
    plots: list[PictureSection] = []
    notes = list(NOTES)
    if not pictures.available():
        notes.append("There are no plots: matplotlib is not installed (pip install 'zoft[plot]').")
    elif any(row.curve for row in rows):
        plots = [
            PictureSection(
                "Loss over forward passes",
                "Dev loss of every method at its best rate, mean over seeds.",
                pictures.loss_over_forwards(rows),
            ),
            PictureSection("Loss over time", "The same over the seconds of the run.", pictures.loss_over_time(rows)),
            PictureSection(
                "Loss against learning rate",
                "Dev loss of the kept weights, mean over seeds; a cross on the upper edge: a run diverged.",
                pictures.loss_over_rate(rows),
            ),
        ]
    shown = [
        TableSection("Scores", "Best of the zeroth-order methods in bold.", tables.scores_table(rows), _best(rows)),
        TableSection(
            "Wins", "Models and tasks on which a zeroth-order method is the best of all.", tables.wins_table(rows)
        ),
        TableSection(
            "Pair by pair",
            "How often the method of the line beats that of the column, by loss · by metric.",
            tables.duels_table(rows),
        ),
    ]
    return page("zoft compare", _subtitle(config, result), shown, plots, notes, configuration)


def _best(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """The best scores on each model and task, as (number of the row, column)."""
    found: set[tuple[int, str]] = set()
    for what in tables.WHATS:
        scores = scores_by(rows, what)
        for place in {row.place for row in rows}:
            here = {method: one[place] for method, one in scores.items() if place in one}
            top = max(here.values(), default=-math.inf)
            for number, row in enumerate(rows):
                if row.place == place and math.isfinite(top) and here.get(row.method) == top:
                    found.add((number, what))
    return found
