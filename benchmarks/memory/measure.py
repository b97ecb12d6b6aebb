"""Peak memory of a case in a fresh process: what both benchmarks of this folder share."""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def peak_in_process(module: str, case: str, arguments: argparse.Namespace, keys: Sequence[str]) -> int:
    """Run ``module --case CASE`` with those of the ``arguments`` that ``keys`` name; return the bytes it prints."""
    command = [sys.executable, "-m", module, "--case", case]
    for key in keys:
        command += [f"--{key}", str(getattr(arguments, key))]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"])


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def parser(description: str, cases: Sequence[str], *, task: str, batch: int) -> argparse.ArgumentParser:
    """Return a parser of the options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--data", type=Path, required=True, help="folder of task data")
    parser.add_argument("--task", default=task)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", choices=cases, help=argparse.SUPPRESS)
    return parser
