"""The tables of a comparison as rows of text, for Markdown and the HTML page."""

import math
from collections.abc import Sequence
from typing import Literal

from zoft.compare.statistics import Estimate, duel, firsts
from zoft.compare.summary import Row, scores_by

Table = tuple[list[str], list[list[str]]]  # head and rows
WHATS: tuple[Literal["loss", "metric"], ...] = ("loss", "metric")


def scores_table(rows: Sequence[Row]) -> Table:
    """Return the table of scores and costs, one line a row."""
    head = ["model", "task", "method", "lr", "loss", "metric", "forwards", "tokens", "time", "peak", "average"]
    head += ["all forwards", "meta-training"]
    return head, [_line(row) for row in rows]


def _line(row: Row) -> list[str]:
    name = {"accuracy": "acc"}.get(row.metric_name, row.metric_name)
    metric = "" if row.metric is None else f"{_text(row.metric)} {name}"
    dev = "" if row.split == "test" else " (dev)"
    return [
        row.model,
        row.task,
        row.method,
        rate(row),
        ("diverged" if row.loss is None else _text(row.loss)) + dev * (row.loss is not None),
        metric,
        f"{row.forwards:,}",
        f"{row.tokens:,}",
        duration(row.seconds),
        size(row.peak_memory_bytes),
        size(row.mean_memory_bytes),
        f"{row.all_forwards:,}",
        "" if row.meta_forwards is None else f"{row.meta_forwards:,}",
    ]


def rate(row: Row) -> str:
    """Return the learning rate of a row, with ``edge`` if no larger or no smaller one was tried."""
    return "" if row.lr is None else f"{row.lr:.3g}{' edge' if row.edge else ''}"


def wins_table(rows: Sequence[Row]) -> Table:
    """Return on how many models and tasks each zeroth-order method is the best, by loss and by metric (ties count)."""
    found = {what: firsts(scores_by(rows, what)) for what in WHATS}
    head = ["method", "lowest loss", "best metric"]
    return head, [[method, *(_share(*found[what].get(method, (0, 0))) for what in WHATS)] for method in found["loss"]]


def duels_table(rows: Sequence[Row]) -> Table:
    """Return for each pair how often the method of the line beats that of the column, by loss / by metric."""
    scores = {what: scores_by(rows, what) for what in WHATS}
    methods = list(scores["loss"])

    def cell(ours: str, theirs: str) -> str:
        if ours == theirs:
            return ""
        parts = []
        for what in WHATS:
            won, drawn, lost = duel(scores[what], ours, theirs)
            parts.append(f"{won}/{won + drawn + lost}")
        return " · ".join(parts)

    return ["beats", *methods], [[ours, *(cell(ours, theirs) for theirs in methods)] for ours in methods]


def markdown(table: Table) -> str:
    """Return ``table`` as Markdown.

    >>> print(markdown((["a", "b"], [["1", "x|y"]])))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    head, rows = table
    lines = [head, *rows]
    text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|---" * len(head) + "|", *text[1:]])


def _text(value: Estimate) -> str:
    """Mean ± spread [interval]."""
    if value.spread is None or value.half is None:
        return f"{value.mean:.3f}"
    low, high = value.mean - value.half, value.mean + value.half
    return f"{value.mean:.3f} ± {value.spread:.3f} [{low:.3f}, {high:.3f}]"


def _share(won: int, places: int) -> str:
    return f"{won}/{places} ({100 * won / places:.1f} %)" if places else ""


def duration(seconds: float) -> str:
    """Return ``seconds`` as text for people.

    >>> duration(4.25), duration(75), duration(3725)
    ('4.2 s', '1:15 min', '1:02:05 h')
    """
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def size(count: int | None) -> str:
    """Return bytes as megabytes or gigabytes.

    >>> size(850_000_000), size(2_340_000_000), size(None)
    ('850 MB', '2.34 GB', '')
    """
    if count is None:
        return ""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
