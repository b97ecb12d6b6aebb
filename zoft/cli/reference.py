"""Write docs/cli.md from the help texts: ``python -m zoft.cli.reference [--check] docs/cli.md``."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from zoft.cli.app import app

_HEAD = """# Command line

Written from the help texts by `make docs`; a test checks that it is up to date.
"""


def reference() -> str:
    """Return the help of ``zoft`` and of each command as Markdown."""
    sections = [
        f"## `{' '.join(['zoft', *path])}`\n\n```text\n{_help(*path)}```\n" for path in _paths(get_command(app))
    ]
    return "\n".join([_HEAD, *sections])


def _paths(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of ``command`` and of every command below it."""
    yield path
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from _paths(below, (*path, name))


def _help(*command: str) -> str:
    width = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}
    text = CliRunner().invoke(app, [*command, "--help"], prog_name="zoft", env=os.environ | width).stdout
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def main(arguments: list[str]) -> int:
    """Write the file, or with ``--check`` report whether it is up to date; return the exit code."""
    check, path = "--check" in arguments, Path(arguments[-1])
    if not check:
        path.write_text(reference(), encoding="utf-8")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == reference():
        return 0
    sys.stderr.write(f"{path} is out of date; run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
