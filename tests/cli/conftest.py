"""A tiny model folder, a data file, and two ways to run the command: in this process and in one of its own."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from zoft.cli.app import app

# The command as the installed script runs it. Under `python -m` a Ctrl-C that arrives inside exec(), as of a data class
# that is made, ends Python by the signal (-2) and not by 130, though it was handled.
ZOFT = [sys.executable, "-c", "from zoft.cli.app import main; main()"]


@pytest.fixture
def zoft() -> Callable[..., Result]:
    """``zoft("tasks", "--json")``: run the command in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="zoft")

    return run


@pytest.fixture
def zoft_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``zoft_process("tasks")``: run the command in a process of its own."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [*ZOFT, *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment, timeout=120, check=False
        )

    return run
