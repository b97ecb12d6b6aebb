"""Time and peak memory of meta-training over those of first-order Adam fine-tuning, same model, same batches.

    python -m benchmarks.metatrain --data DIR [--task copa] [--model M] [--batch 8] [--points 6] [--checkpoint] [--json]

Both train float32 weights; meta-training returns to the base once on the way. The Adam loop is plain PyTorch: backward,
step, gradients freed. ``adam`` is ``foreach=False``, which takes the least; ``adam_foreach`` updates all at once.
Each case runs in a fresh process. On a CPU memory is peak RSS minus RSS after the imports, on a GPU what torch
allocated at most. ``ratio`` is that of memory, ``ratio_time`` that of the median times of a point (8 forwards, where a
backward counts two) and of a step of Adam (3).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.memory import measure
from benchmarks.models import default_model

if TYPE_CHECKING:  # torch and zoft are imported in the processes that are measured
    from zoft.metatrain import MetatrainConfig

CASES = ("metatrain", "adam", "adam_foreach")
KEYS = ("model", "task", "data", "batch", "points", "dtype", "teacher")


def main() -> None:
    """Run all cases, each in its own process, and print the ratios."""
    arguments = _parsed()
    if arguments.case:
        print(json.dumps(_case(arguments)))
        return
    from zoft.model.sources import resolve

    arguments.model = str(resolve(arguments.model or default_model()).path)
    flags = ["--checkpoint"] if arguments.checkpoint else []
    with tempfile.TemporaryDirectory() as home:
        os.environ["ZOFT_HOME"] = home  # the card stays out of the user's store
        cases = {case: measure.in_process("benchmarks.metatrain", case, arguments, KEYS, flags) for case in CASES}
    meta, adam, foreach = (cases[case] for case in CASES)
    found = {
        "dtype": arguments.dtype,
        "teacher": arguments.teacher,
        "checkpoint": arguments.checkpoint,
        "batch": arguments.batch,
        "points": arguments.points,
        "ratio": meta["bytes"] / adam["bytes"],
        "ratio_foreach": meta["bytes"] / foreach["bytes"],
        "ratio_time": meta["seconds"] / adam["seconds"],
        "ratio_time_foreach": meta["seconds"] / foreach["seconds"],
        **{f"{case}_bytes": of["bytes"] for case, of in cases.items()},
        **{f"{case}_seconds": of["seconds"] for case, of in cases.items()},
    }
    measure.show("metatrain", found, arguments)


def _case(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from zoft.events import MetaEvent, MetaStepDone
    from zoft.memory import peak_memory_bytes
    from zoft.metatrain import MetatrainConfig, metatrain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = 0 if device.type == "cuda" else measure.resident()
    ends: list[float] = []

    def listen(event: MetaEvent) -> None:
        if isinstance(event, MetaStepDone):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = MetatrainConfig(
            model=arguments.model,
            tasks=(arguments.task,),
            data=arguments.data,
            steps=arguments.points,
            reset_every=arguments.points // 2,
            batch_size=arguments.batch,
            evidence=0,
            compare_every=0,
            dtype=arguments.dtype,
            teacher=arguments.teacher,
            checkpoint_activations=arguments.checkpoint,
            device=device.type,
            out=Path(folder) / "card.tuner.safetensors",
        )
        if arguments.case == "metatrain":
            metatrain(config, on_event=listen)
        else:
            ends = _fine_tune(config, foreach=arguments.case == "adam_foreach")
    seconds = statistics.median(later - sooner for sooner, later in pairwise(ends))
    return {"bytes": peak_memory_bytes(device) - before, "seconds": seconds}


def _fine_tune(config: "MetatrainConfig", *, foreach: bool) -> list[float]:
    """First-order Adam on the batches that the meta-training takes; return when each step ended."""
    import torch

    from zoft.metatrain.sampling import batch_of, closure_of, prepare
    from zoft.model.load import load

    loaded = load(config.model, dtype="fp32", device=config.device)
    data = prepare(config.tasks[0], config, loaded)
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=config.teacher_lr, foreach=foreach)
    ends = []
    for step in range(config.steps):
        loss = closure_of(data, batch_of(data.prepared.train, config, config.seed, step), loaded, config)()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device
        ends.append(time.perf_counter())
    return ends


def _parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, CASES, task="copa", batch=8)
    parser.add_argument("--points", type=int, default=6, help="of the meta-training, and steps of Adam; at least 4")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the computation")
    parser.add_argument("--teacher", default="adam", choices=["adam", "adam8bit", "sgd"])
    parser.add_argument("--checkpoint", action="store_true", help="meta-train with checkpoint_activations")
    return parser.parse_args()


if __name__ == "__main__":
    main()
