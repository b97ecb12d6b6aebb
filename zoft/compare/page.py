"""The page of a comparison: one HTML file that needs nothing beside it."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

from zoft.compare.tables import Table

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2rem auto; padding: 0 1rem; color: #1b1f24;
  background: #fff; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; padding-bottom: .2rem; }
p.sub { color: #57606a; margin-top: .2rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eaeef2; }
th { background: #f6f8fa; position: sticky; top: 0; }
th.text, td.text { text-align: left; }
td.best { font-weight: 650; } td.edge { color: #9a6700; }
tr.first td { border-top: 2px solid #d0d7de; }
img { max-width: 100%; height: auto; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: 12.5px; }
"""
_TEXT_COLUMNS = {"model", "task", "method", "beats"}


def page(
    title: str,
    subtitle: str,
    tables: Mapping[str, tuple[str, Table, set[tuple[int, str]]]],
    pictures: Mapping[str, tuple[str, str]],
    notes: Sequence[str],
    configuration: str,
) -> str:
    """Return the HTML of the page.

    Args:
        title, subtitle: its head.
        tables: by heading, a sentence, the table and the cells (number of the row, column) that are the best.
        pictures: by heading, a sentence and an SVG.
        notes: what has to be known to read it.
        configuration: how the comparison is repeated.
    """
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(subtitle)}</p>']
    for heading, (told, table, best) in tables.items():
        parts += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(told)}</p>", _table(table, best)]
    for heading, (told, svg) in pictures.items():
        data = base64.b64encode(svg.encode()).decode()
        parts += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(told)}</p>"]
        parts.append(f'<img alt="{escape(heading)}" src="data:image/svg+xml;base64,{data}">')
    parts += ["<h2>How to read this</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]
    parts += ["<h2>Configuration</h2>", f"<pre>{escape(configuration)}</pre>"]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _table(table: Table, best: set[tuple[int, str]]) -> str:
    head, rows = table
    classes = ["text" if name in _TEXT_COLUMNS else "" for name in head]
    lines = [f"<tr>{''.join(_cell('th', name, kind) for name, kind in zip(head, classes, strict=True))}</tr>"]
    before: list[str] = []
    for number, row in enumerate(rows):
        cells = [
            _cell("td", value, " ".join(filter(None, (kind, _mark(name, value, (number, name) in best)))))
            for name, value, kind in zip(head, row, classes, strict=True)
        ]
        new = head[:2] == ["model", "task"] and row[:2] != before
        before = row[:2]
        opening = '<tr class="first">' if new else "<tr>"
        lines.append(f"{opening}{''.join(cells)}</tr>")
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def _mark(column: str, value: str, best: bool) -> str:
    if best:
        return "best"
    return "edge" if column == "lr" and value.endswith("edge") else ""


def _cell(tag: str, text: str, kind: str) -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"
