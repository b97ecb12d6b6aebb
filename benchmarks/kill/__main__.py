"""Kill a run with SIGKILL at random moments, resume it each time, and compare the weights with an unbroken run's.

    python -m benchmarks.kill --model M --data DIR [--task sst2] [--kills 20] [--steps 60] [--dtype bf16] [--seed 0]

Prints how far the journal was at every kill, and exits 1 unless the final weights and journals are the same, bit for
bit. Moments are drawn over the time that an unbroken run takes, start-up included.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.models import default_model
from zoft.deploy.journal import read_journal


def main() -> None:
    """Run, kill, resume, compare."""
    arguments = _parsed()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        unbroken, killed = Path(folder) / "unbroken", Path(folder) / "killed"
        begin = time.perf_counter()
        if _start(arguments, unbroken).wait():
            raise SystemExit("the unbroken run failed")
        took = time.perf_counter() - begin
        print(f"unbroken: {took:.1f} s", flush=True)
        for kill in range(arguments.kills):
            process = _start(arguments, killed)
            time.sleep(moments.uniform(0.2, took * 1.5 / 3))
            process.kill()
            process.wait()
            journal = killed / "journal"
            contents = read_journal(journal) if journal.exists() else None
            steps = len(contents.steps) if contents else 0
            state = "finished" if contents and contents.end else f"{steps} steps in the journal"
            print(f"kill {kill + 1}: {state}", flush=True)
        if _start(arguments, killed).wait():
            raise SystemExit("the resumed run failed")
        same_steps = read_journal(unbroken / "journal").steps == read_journal(killed / "journal").steps
        hashes = [_sha256(run / "model" / "model.safetensors") for run in (unbroken, killed)]
        print(json.dumps({"kills": arguments.kills, "same_records": same_steps, "same_weights": len(set(hashes)) == 1}))
        raise SystemExit(0 if same_steps and len(set(hashes)) == 1 else 1)


def _start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "zoft.cli.app", "finetune", arguments.model or default_model()]
    command += ["--task", arguments.task, "--data", str(arguments.data), "--steps", str(arguments.steps)]
    command += ["--lr", "1.6e-5", "--batch-size", "8", "--dtype", arguments.dtype, "--resume", "--out", str(out)]
    command += ["--set", f"dev_size={arguments.limit}", "--set", f"test_size={arguments.limit}"]
    command += ["--eval-every", str(max(1, arguments.steps // 5)), "--snapshot-every", str(arguments.snapshot_every)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
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
