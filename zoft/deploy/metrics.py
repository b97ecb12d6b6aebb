"""Rows of ``metrics.jsonl``: the journal's numbers as plots need them."""

import math
from typing import Any

from zoft.deploy.journal import Contents, EvalLine
from zoft.optim import ProjectionRecord, StepRecord


def step_metrics(record: StepRecord) -> dict[str, Any]:
    """Return the row of a step; ``step`` counts the steps taken, this one included."""
    exact = {name: record.extra[name] for name in ("exact_lr", "exact_norm") if name in record.extra}
    return {
        "step": record.step + 1,
        "loss": _number(record.loss),
        "lr": record.lr[0],
        "slopes": [_number(slope) for slope in record.slopes],
        "skipped": record.skipped,
        **exact,
    }


def projection_metrics(record: ProjectionRecord) -> dict[str, Any]:
    """Return the row of a projection: the factor of each projected block's displacement, and its length."""
    return {"step": record.step + 1, "ratios": list(record.ratios), "norms": list(record.norms)}


def eval_metrics(line: EvalLine) -> dict[str, Any]:
    """Return the row of a dev evaluation."""
    row = {"step": line.step, "eval_loss": _number(line.loss), "metric": line.metric, "kept": line.kept}
    return row if line.displacement is None else {**row, "displacement": line.displacement}


def metrics_so_far(contents: Contents) -> list[dict[str, Any]]:
    """Return the rows of a whole journal, in order of steps."""
    rows = [(record.step + 1, 0, step_metrics(record)) for record in contents.steps]
    rows += [(record.step + 1, 1, projection_metrics(record)) for record in contents.projections.values()]
    rows += [(line.step, 2, eval_metrics(line)) for line in contents.evaluations]
    return [row for _, _, row in sorted(rows, key=lambda row: row[:2])]


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
