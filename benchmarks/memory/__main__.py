"""Peak memory of `zoft finetune` over that of `zoft eval` at the same batch.

    python -m benchmarks.memory --data DIR [--task sst2] [--model M] [--dtype bf16] [--batch 16] [--steps 12] [--json]

Each case runs in a fresh process. On a CPU the figure is peak RSS minus RSS after the imports, on a GPU what torch
allocated at most. The conversion of a GGUF and the hash of the base are cached beforehand, as on any second run.
Take a few hundred rows: the heap grows over the first dozen of batches (glibc 2.36), and a short evaluation would be
compared with a long run.

``ratio`` is fine-tuning over the evaluation on dev, ``ratio_to_larger`` over the larger of both splits. ``ratio_naive``
is a MeZO loop as published (in-place sweeps, a full row for every choice) over the evaluation on dev. ``ratio_weights``
is the evaluation on dev over the bytes of the weights, ``ratio_load`` merely loading them over these bytes.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.memory import measure
from benchmarks.models import default_model

if TYPE_CHECKING:  # torch and zoft are imported in the processes that are measured
    import torch

    from zoft.tasks import Encoded

CASES = ("load", "dev", "test", "finetune", "naive")  # `zoft eval` on a split; `zoft finetune`, which scores both
KEYS = ("model", "task", "data", "dtype", "batch", "limit", "steps")


def main() -> None:
    """Run every case in its own process; print the ratios."""
    arguments = _parsed()
    if arguments.case:
        print(json.dumps(_case(arguments)))
        return
    from zoft.model import fingerprint
    from zoft.model.sources import resolve

    arguments.model = str(resolve(arguments.model or default_model()).path)
    fingerprint.base_hash(Path(arguments.model))
    cases = {case: measure.in_process("benchmarks.memory", case, arguments, KEYS) for case in CASES}
    peaks, weights = {case: found["bytes"] for case, found in cases.items()}, cases["load"]["weights"]
    found = {
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "ratio": peaks["finetune"] / peaks["dev"],
        "ratio_to_larger": peaks["finetune"] / max(peaks["dev"], peaks["test"]),
        "ratio_naive": peaks["naive"] / peaks["dev"],
        "ratio_weights": peaks["dev"] / weights,
        "ratio_load": peaks["load"] / weights,
        **{f"{case}_bytes": peak for case, peak in peaks.items()},
        "weights_bytes": weights,
    }
    measure.show("memory", found, arguments)


def _case(arguments: argparse.Namespace) -> dict[str, int]:
    import torch

    from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune
    from zoft.memory import peak_memory_bytes

    common = {"model": arguments.model, "task": arguments.task, "data": arguments.data, "dtype": arguments.dtype}
    before = 0 if torch.cuda.is_available() else measure.resident()
    found: dict[str, int] = {}
    if arguments.case in ("load", "naive"):
        device, found["weights"] = (_load if arguments.case == "load" else _naive)(arguments)
        return found | {"bytes": peak_memory_bytes(device) - before}
    common |= {"dev_size": arguments.limit, "test_size": arguments.limit}
    if arguments.case != "finetune":
        config = EvalConfig(**common, batch_size=arguments.batch, split=arguments.case)
        peak = evaluate_model(config).peak_memory_bytes
    else:
        with tempfile.TemporaryDirectory() as out:
            batches = {"batch_size": arguments.batch, "eval_batch_size": arguments.batch}
            steps = {"steps": arguments.steps, "eval_every": arguments.steps}
            peak = finetune(FinetuneConfig(**common, **batches, **steps, out=Path(out) / "run")).peak_memory_bytes
    return {"bytes": peak - before}


def _load(arguments: argparse.Namespace) -> "tuple[torch.device, int]":
    """Load the model as fine-tuning does, and read its weights; return its device and their bytes."""
    from zoft.model.load import load

    model = load(arguments.model, dtype=arguments.dtype, fp32_vectors=True, bound_kernels=True).model
    for parameter in model.parameters():
        parameter.data.amax()  # a memory-mapped file is in memory once it is read
    return model.device, sum(parameter.nbytes for parameter in model.parameters())


def _naive(arguments: argparse.Namespace) -> "tuple[torch.device, int]":
    """Steps of MeZO in plain PyTorch."""
    import torch

    from benchmarks.rows import full_rows
    from benchmarks.step.measure import naive_step
    from zoft import tasks
    from zoft.model.load import load

    loaded = load(arguments.model, dtype=arguments.dtype, bound_kernels=True)
    length = loaded.context_length
    prepared = tasks.prepare(
        arguments.task, arguments.data, loaded.tokenizer, context_length=length, splits=("train",), train_size=1000
    )
    parameters = list(loaded.model.parameters())
    with torch.no_grad():
        for step in range(arguments.steps):
            rows = [prepared.train[i] for i in tasks.batch_indices(len(prepared.train), arguments.batch, 0, step)]

            def closure(rows: "Sequence[Encoded]" = rows) -> torch.Tensor:
                return torch.tensor(full_rows(loaded, prepared.task, rows)[0])

            naive_step(parameters, closure, lr=1e-7, eps=1e-3, seed=step)
    return loaded.model.device, sum(parameter.nbytes for parameter in parameters)


def _parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, CASES, task="sst2", batch=16)
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--limit", type=int, default=256, help="rows of dev and test")
    parser.add_argument("--steps", type=int, default=12, help="steps of fine-tuning")
    return parser.parse_args()


if __name__ == "__main__":
    main()
