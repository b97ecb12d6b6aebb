"""Peak memory of `zoft finetune` over that of `zoft eval` at the same batch.

    python -m benchmarks.memory --data DIR [--task sst2] [--model M] [--dtype bf16] [--batch 16] [--json]

Each case runs in a fresh process. On a CPU the figure is peak RSS minus RSS after the imports, on a GPU what torch
allocated at most. The conversion of a GGUF and the hash of the base are cached beforehand, as on any second run.
Take a few hundred rows: the heap grows over the first dozen of batches (glibc 2.36), and a short evaluation would be
compared with a long run.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.models import default_model

CASES = ("dev", "test", "finetune")  # `zoft eval` on a split, or `zoft finetune`, which scores both


def main() -> None:
    """Run every case in its own process, and print the ratio of fine-tuning to the larger evaluation."""
    arguments = _parsed()
    if arguments.case:
        print(json.dumps(_case(arguments)))
        return
    from zoft import fingerprint, models

    arguments.model = str(models.resolve(arguments.model or default_model()).path)
    fingerprint.base_hash(Path(arguments.model))
    peaks = {case: _in_process(case, arguments) for case in CASES}
    found = {
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        **{f"{case}_bytes": peak for case, peak in peaks.items()},
        "ratio": peaks["finetune"] / max(peaks["dev"], peaks["test"]),
    }
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:16} {value}" for key, value in found.items()))


def _in_process(case: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--case", case]
    for key in ("model", "task", "data", "dtype", "batch", "limit"):
        command += [f"--{key}", str(getattr(arguments, key))]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["bytes"])


def _case(arguments: argparse.Namespace) -> dict[str, int]:
    from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune

    common = {"model": arguments.model, "task": arguments.task, "data": arguments.data, "dtype": arguments.dtype}
    before = _resident()
    common |= {"dev_size": arguments.limit, "test_size": arguments.limit}
    if arguments.case != "finetune":
        config = EvalConfig(**common, batch_size=arguments.batch, split=arguments.case)
        peak = evaluate_model(config).peak_memory_bytes
    else:
        with tempfile.TemporaryDirectory() as out:
            batches = {"batch_size": arguments.batch, "eval_batch_size": arguments.batch}
            steps = {"steps": 4, "eval_every": 4}
            peak = finetune(FinetuneConfig(**common, **batches, **steps, out=Path(out) / "run")).peak_memory_bytes
    import torch

    return {"bytes": peak if torch.cuda.is_available() else peak - before}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--data", type=Path, required=True, help="folder of task data")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, default=256, help="rows of dev and test")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
