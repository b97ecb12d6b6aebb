"""Write what is generated for the command line: ``python -m zoft.cli.reference [--check] docs/cli.md``.

``fields.json`` holds the descriptions and defaults of the configurations, for help without torch; docs/cli.md the help.
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined
from typer.main import get_command
from typer.testing import CliRunner

from zoft.cli import options
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


def fields() -> str:
    """Return description and default of every field of the configurations that commands set, as JSON."""
    commands = (_command(path) for path in _paths(get_command(app)))
    configs = sorted({config for command in commands for config in getattr(command, "configs", ())})
    found = {}
    for config in configs:
        module, _, name = config.partition(":")
        model = getattr(importlib.import_module(module), name)
        found[config] = {field: _described(info) for field, info in model.model_fields.items()}
    return json.dumps(found, indent=1) + "\n"


def _described(field: Any) -> dict[str, str]:
    """Description and default of a field; a description may end in the default that None stands for."""
    description, _, default = (field.description or "").partition("; default: ")
    return {"description": description, "default": default or _shown(field.get_default())}


def _shown(default: Any) -> str:
    """A default as it would be typed; "" for a switch that is off and where there is none.

    >>> _shown(1e-05), _shown(0.0), _shown(("kind", "block")), _shown(False), _shown(0)
    ('1e-05', '0', 'kind,block', '', '0')
    """
    if default in (None, PydanticUndefined) or isinstance(default, bool | dict):
        return ""
    if isinstance(default, tuple | list):
        return ",".join(map(_shown, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _command(path: tuple[str, ...]) -> Any:
    command: Any = get_command(app)
    for name in path:
        command = command.commands[name]
    return command


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
    """Write the files, or with ``--check`` report whether they are up to date; return the exit code."""
    for path, generate in ((options.FIELDS, fields), (Path(arguments[-1]), reference)):
        if "--check" not in arguments:
            path.write_text(generate(), encoding="utf-8")
            options.fields.cache_clear()
        elif not path.is_file() or path.read_text(encoding="utf-8") != generate():
            sys.stderr.write(f"{path} is out of date; run `make docs`\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
