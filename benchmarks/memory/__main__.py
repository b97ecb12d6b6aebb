"""Peak memory of `zoft finetune` over that of `zoft eval` at the same batch.

    python -m benchmarks.memory --data DIR [--task sst2] [--model M] [--dtype bf16] [--batch 16] [--steps 12] [--json]

Each case runs in a fresh process. On a CPU the figure is peak RSS minus RSS after the imports, on a GPU what torch
allocated at most. The conversion of a GGUF and the hash of the base are cached beforehand, as on any second run.
Take a few hundred rows: the heap grows over the first dozen of batches (glibc 2.36), and a short evaluation would be
compared with a long run.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.memory import measure
from benchmarks.models import default_model

CASES = ("dev", "test", "finetune")  # `zoft eval` on a split, or `zoft finetune`, which scores both
KEYS = ("model", "task", "data", "dtype", "batch", "limit", "steps")


def main() -> None:
    """Run every case in its own process; print the ratios of fine-tuning to them."""
    arguments = _parsed()
    if arguments.case:
        print(json.dumps(_case(arguments)))
        return
    from zoft import fingerprint, models

    arguments.model = str(models.resolve(arguments.model or default_model()).path)
    fingerprint.base_hash(Path(arguments.model))
    peaks = {case: measure.peak_in_process("benchmarks.memory", case, arguments, KEYS) for case in CASES}
    found = {
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        **{f"{case}_bytes": peak for case, peak in peaks.items()},
        "ratio": peaks["finetune"] / peaks["dev"],
        "ratio_to_larger": peaks["finetune"] / max(peaks["dev"], peaks["test"]),
    }
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:16} {value}" for key, value in found.items()))


def _case(arguments: argparse.Namespace) -> dict[str, int]:
    from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune

    common = {"model": arguments.model, "task": arguments.task, "data": arguments.data, "dtype": arguments.dtype}
    before = measure.resident()
    common |= {"dev_size": arguments.limit, "test_size": arguments.limit}
    if arguments.case != "finetune":
        config = EvalConfig(**common, batch_size=arguments.batch, split=arguments.case)
        peak = evaluate_model(config).peak_memory_bytes
    else:
        with tempfile.TemporaryDirectory() as out:
            batches = {"batch_size": arguments.batch, "eval_batch_size": arguments.batch}
            steps = {"steps": arguments.steps, "eval_every": arguments.steps}
            peak = finetune(FinetuneConfig(**common, **batches, **steps, out=Path(out) / "run")).peak_memory_bytes
    import torch

    return {"bytes": peak if torch.cuda.is_available() else peak - before}


def _parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, CASES, task="sst2", batch=16)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--limit", type=int, default=256, help="rows of dev and test")
    parser.add_argument("--steps", type=int, default=12, help="steps of fine-tuning")
    return parser.parse_args()


if __name__ == "__main__":
    main()
