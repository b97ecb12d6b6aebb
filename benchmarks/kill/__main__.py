"""Kill a run with SIGKILL at random moments, resume it, and compare the weights with those of an uninterrupted run.

    python -m benchmarks.kill --model M --data DIR [--task sst2] [--kills 20] [--steps 60] [--dtype bf16] [--seed 0]

Prints how far the journal was at every kill, and exits 1 unless the final weights and records are the same, bit for
bit. Moments are drawn over half the time that an unbroken run takes, start-up included. A run that came to its end is
compared and another begun, so that every kill strikes a run that is under way.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.models import default_model
from zoft.deploy.journal import read_journal
from zoft.optim import StepRecord


def main() -> None:
    """Run once unbroken; then kill and resume, as many runs as it takes; compare each with the unbroken one."""
    arguments = _parsed()
    moments = random.Random(arguments.seed)
    kills = runs = 0
    same_records = same_weights = True
    with tempfile.TemporaryDirectory() as folder:
        unbroken, killed = Path(folder) / "unbroken", Path(folder) / "killed"
        begin = time.perf_counter()
        _finish(_start(arguments, unbroken))
        took = time.perf_counter() - begin
        print(f"unbroken: {took:.1f} s", flush=True)
        while kills < arguments.kills:
            while kills < arguments.kills and _killed(_start(arguments, killed), moments.uniform(0.2, took / 2)):
                kills += 1
                print(f"run {runs + 1}, kill {kills}: {_progress(killed)}", flush=True)
            _finish(_start(arguments, killed))
            runs += 1
            same_records &= _records(killed) == _records(unbroken)
            same_weights &= _sha256(killed) == _sha256(unbroken)
            shutil.rmtree(killed)
    print(json.dumps({"kills": kills, "runs": runs, "same_records": same_records, "same_weights": same_weights}))
    raise SystemExit(0 if same_records and same_weights else 1)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"a run failed with exit code {process.returncode}")


def _killed(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Kill ``process`` after ``seconds``; False if it ended before."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    _finish(process)
    return False


def _progress(run: Path) -> str:
    journal = run / "journal"
    if not journal.exists():
        return "before the journal"
    contents = read_journal(journal)
    return f"{len(contents.steps)} steps, {len(contents.evaluations)} evaluations" + (", ended" if contents.end else "")


def _records(run: Path) -> list[StepRecord]:
    return read_journal(run / "journal").steps


def _start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zoft.cli.app", "finetune", arguments.model or default_model()]
    command += ["--task", arguments.task, "--data", str(arguments.data), "--steps", str(arguments.steps)]
    command += ["--lr", "1.6e-5", "--batch-size", "8", "--dtype", arguments.dtype, "--resume", "--out", str(out)]
    command += ["--set", f"dev_size={arguments.limit}", "--set", f"test_size={arguments.limit}"]
    command += ["--eval-every", str(max(1, arguments.steps // 5)), "--snapshot-every", str(arguments.snapshot_every)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _sha256(run: Path) -> str:
    with (run / "model" / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--data", type=Path, required=True, help="folder of task data")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--limit", type=int, default=32, help="rows of dev and test")
    parser.add_argument("--snapshot-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
