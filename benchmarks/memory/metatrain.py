"""Peak memory of meta-training over that of first-order Adam fine-tuning of the same model on the same batches.

    python -m benchmarks.memory.metatrain --data DIR [--task copa] [--model M] [--batch 8] [--points 6] [--json]

Both train float32 weights; meta-training returns to the base once on the way. The Adam loop is plain PyTorch: backward,
step, gradients freed. ``adam`` is ``foreach=False``, which takes the least; ``adam_foreach`` updates all at once.
Each case runs in a fresh process. On a CPU the figure is peak RSS minus RSS after the imports, on a GPU what torch
allocated at most.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.memory import measure
from benchmarks.models import default_model

if TYPE_CHECKING:  # torch and zoft are imported in the processes that are measured
    from zoft.metatrain import MetatrainConfig

CASES = ("metatrain", "adam", "adam_foreach")
KEYS = ("model", "task", "data", "batch", "points")


def main() -> None:
    """Run all cases, each in its own process, and print the ratios."""
    arguments = _parsed()
    if arguments.case:
        print(json.dumps(_case(arguments)))
        return
    from zoft import models

    arguments.model = str(models.resolve(arguments.model or default_model()).path)
    with tempfile.TemporaryDirectory() as home:
        os.environ["ZOFT_HOME"] = home  # the card stays out of the user's store
        peaks = {case: measure.peak_in_process("benchmarks.memory.metatrain", case, arguments, KEYS) for case in CASES}
    found = {
        "batch": arguments.batch,
        "points": arguments.points,
        **{f"{case}_bytes": peak for case, peak in peaks.items()},
        "ratio": peaks["metatrain"] / peaks["adam"],
        "ratio_foreach": peaks["metatrain"] / peaks["adam_foreach"],
    }
    print(json.dumps(found) if arguments.json else "\n".join(f"{key:18} {value}" for key, value in found.items()))


def _case(arguments: argparse.Namespace) -> dict[str, int]:
    import torch

    from zoft.deploy.evaluate import peak_memory_bytes
    from zoft.metatrain import MetatrainConfig, metatrain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = 0 if device.type == "cuda" else measure.resident()
    with tempfile.TemporaryDirectory() as folder:
        config = MetatrainConfig(
            model=arguments.model,
            tasks=(arguments.task,),
            data=arguments.data,
            steps=arguments.points,
            reset_every=arguments.points // 2,
            batch_size=arguments.batch,
            evidence=0,
            dtype="fp32",
            device=device.type,
            out=Path(folder) / "card.tuner.safetensors",
        )
        if arguments.case == "metatrain":
            metatrain(config)
        else:
            _fine_tune(config, foreach=arguments.case == "adam_foreach")
    return {"bytes": peak_memory_bytes(device) - before}


def _fine_tune(config: "MetatrainConfig", *, foreach: bool) -> None:
    """First-order Adam on the batches that the meta-training takes."""
    import torch

    from zoft import models
    from zoft.metatrain.data import batch_of, closure_of, prepare

    loaded = models.load(config.model, dtype="fp32", device=config.device)
    data = prepare(config.tasks[0], config, loaded)
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=config.teacher_lr, foreach=foreach)
    for step in range(config.steps):
        closure_of(data, batch_of(data.prepared.train, config, config.seed, step), loaded, config)().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _parsed() -> argparse.Namespace:
    parser = measure.parser(__doc__, CASES, task="copa", batch=8)
    parser.add_argument("--points", type=int, default=6, help="of the meta-training, and steps of Adam; at least 4")
    return parser.parse_args()


if __name__ == "__main__":
    main()
