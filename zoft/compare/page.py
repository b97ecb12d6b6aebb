"""Render the report of a comparison as one HTML file without external resources."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined

from zoft.compare.tables import Table

_TEXT_COLUMNS = {"model", "task", "method", "beats"}


@dataclass(frozen=True)
class TableSection:
    """A heading, a sentence and a table; ``best`` are its best cells, as (number of the row, name of the column)."""

    heading: str
    text: str
    table: Table
    best: set[tuple[int, str]] = field(default_factory=set)

    @property
    def head(self) -> "list[_Cell]":
        """The cells of the head."""
        return [_Cell(name, _alignment(name)) for name in self.table[0]]

    @property
    def rows(self) -> "list[_Row]":
        """The rows below the head."""
        head, lines = self.table
        places = [line[:2] for line in lines] if head[:2] == ["model", "task"] else []
        return [
            _Row(
                [_Cell(text, self._classes(number, name, text)) for name, text in zip(head, line, strict=True)],
                starts_a_place=bool(places) and (number == 0 or places[number] != places[number - 1]),
            )
            for number, line in enumerate(lines)
        ]

    def _classes(self, number: int, column: str, text: str) -> list[str]:
        if (number, column) in self.best:
            return [*_alignment(column), "best"]
        return [*_alignment(column), "edge"] if column == "lr" and text.endswith("edge") else _alignment(column)


@dataclass(frozen=True)
class PictureSection:
    """A heading, a sentence and a plot."""

    heading: str
    text: str
    svg: str


@dataclass(frozen=True)
class _Cell:
    text: str
    classes: list[str]


@dataclass(frozen=True)
class _Row:
    cells: list[_Cell]
    starts_a_place: bool


def page(
    title: str,
    subtitle: str,
    tables: Sequence[TableSection],
    pictures: Sequence[PictureSection],
    notes: Sequence[str],
    configuration: str,
) -> str:
    """Return the HTML of the page.

    Args:
        title, subtitle: its head.
        tables, pictures: its sections.
        notes: how to read it.
        configuration: YAML that repeats the comparison.
    """
    environment = Environment(
        loader=PackageLoader("zoft.compare"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    return environment.get_template("page.html.j2").render(
        title=title,
        subtitle=subtitle,
        tables=tables,
        pictures=pictures,
        notes=notes,
        configuration=configuration,
    )


def _alignment(column: str) -> list[str]:
    return ["text"] if column in _TEXT_COLUMNS else []
