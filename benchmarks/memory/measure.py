"""Measure the peak memory of a case in a fresh process; shared by the memory benchmarks."""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import page


def in_process(
    module: str, case: str, arguments: argparse.Namespace, keys: Sequence[str], flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Run ``module --case CASE`` with ``flags`` and the ``arguments`` that ``keys`` name; return what it prints."""
    command = [sys.executable, "-m", module, "--case", case, *flags]
    for key in keys:
        command += [f"--{key}", str(getattr(arguments, key))]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def show(name: str, found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the figures, and with ``--write`` put them into docs/performance.md."""
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:22} {value}" for key, value in found.items()))
    if arguments.write:
        shown = {key: f"{value / 2**20:,.0f} MiB" if key.endswith("_bytes") else value for key, value in found.items()}
        page.write(arguments.write, page.table(["what", name], [[key.replace("_", " "), shown[key]] for key in shown]))


def parser(description: str, cases: Sequence[str], *, task: str, batch: int) -> argparse.ArgumentParser:
    """Return a parser of the options that these benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--data", type=Path, required=True, help="folder of task data")
    parser.add_argument("--task", default=task)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", metavar="MARK", help="also put the figures into docs/performance.md, at this mark")
    parser.add_argument("--case", choices=cases, help=argparse.SUPPRESS)
    return parser
