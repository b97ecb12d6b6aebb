"""Output: results on stdout, as text or as one JSON object; everything else on stderr."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table


class Output:
    """The output of a command.

    Args:
        as_json: print the result as one JSON object instead of text.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        # No markup and no highlighting: paths and messages may hold square brackets.
        self.stderr = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """Print a message on stderr."""
        self.stderr.print(message)

    def warn(self, message: str) -> None:
        """Print a warning on stderr."""
        self.stderr.print(f"warning: {message}", style="yellow")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print a table on stderr."""
        self.stderr.print(_table(columns, rows), soft_wrap=False)

    def result(self, values: Any, shown: Mapping[str, Any]) -> None:
        """Print a result: ``values`` (a pydantic model or a mapping) as JSON, or the lines of ``shown``.

        None values, which do not apply, are left out of both.
        """
        if self.as_json:
            self._json(values)
            return
        shown = {name: value for name, value in shown.items() if value is not None}
        width = max(map(len, shown), default=0)
        for name, value in shown.items():
            typer.echo(f"{name:<{width}}  {_text(value)}")

    def rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a list as a table on stdout, or as the JSON object ``{name: rows}``."""
        if self.as_json:
            self._json({name: rows})
            return
        columns = list(rows[0]) if rows else []
        Console(markup=False, highlight=False).print(_table(columns, [[row[c] for c in columns] for row in rows]))

    def _json(self, values: Any) -> None:
        from pydantic_core import to_jsonable_python

        plain = to_jsonable_python(values, inf_nan_mode="null")
        typer.echo(json.dumps(_without_none(plain), ensure_ascii=False, allow_nan=False))


def decimals(value: float | None) -> str | None:
    """Return a loss or a metric with the four decimals that tables show.

    >>> decimals(0.75), decimals(None)
    ('0.7500', None)
    """
    return None if value is None else f"{value:.4f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)  # the name of a row is not wrapped
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    """A value for people: numbers with few digits and thousands separators, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
