"""Cost of a batch if only what its loss needs is computed, relative to one full row for every choice.

    python -m benchmarks.rows --data DIR [--model M] [--dtype bf16] [--batch 16] [--task sst2 --task trec] [--json]

Full rows are as the published codes run them (princeton-nlp/MeZO): every choice behind its own copy of the prompt,
padded to a multiple of 8, logits and their softmax at every position. ``loss`` is the training loss of a batch (of
copa's, both read the gold choice only), ``scores`` are those of all choices, as an evaluation needs them. Both ways
take turns on the same batches; ``time`` and ``tokens`` (padding counted) are their ratios, medians over batches, and
``difference`` is the largest between the losses of both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import page
from benchmarks.models import default_model
from zoft import tasks
from zoft.model.load import Loaded, load
from zoft.tasks.batches import length_step
from zoft.tasks.packing import packable
from zoft.tasks.types import Encoded, Task

TASKS = ("sst2", "trec", "copa", "multirc")


Way = Callable[[Loaded, Task, Sequence[Encoded]], tuple[float, int]]


def main() -> None:
    """Measure and print."""
    arguments = _parsed()
    loaded = load(
        arguments.model or default_model(), dtype=arguments.dtype, device=arguments.device, bound_kernels=True
    )
    settings = {
        "device": loaded.model.device.type,
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "batch": arguments.batch,
    }
    with torch.no_grad():
        found = [measured(name, loaded, arguments) for name in arguments.task or TASKS]
    text = page.table(list(found[0]), [list(row.values()) for row in found])
    print(json.dumps({**settings, "tasks": found}) if arguments.json else text)
    if arguments.write:
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        page.write(f"rows {arguments.dtype}", f"{said}:\n\n{text}")


def measured(name: str, loaded: Loaded, arguments: argparse.Namespace) -> dict[str, Any]:
    """The ratios of one task."""
    prepared = tasks.prepare(
        name,
        arguments.data,
        loaded.tokenizer,
        context_length=loaded.context_length,
        splits=("train",),
        train_size=arguments.batch * (arguments.batches + 1),
    )
    rows = prepared.train
    found: dict[str, Any] = {"task": name, "choices": len(rows[0].example.choices)}
    for case in ("loss", "scores"):
        times, tokens, differences = [], [], []
        for step in range(len(rows) // arguments.batch):
            batch = [rows[i] for i in tasks.batch_indices(len(rows), arguments.batch, 0, step)]
            if case == "scores":
                batch = [replace(one, loss_rows=one.rows) for one in batch]
            ours, full = (_timed(way, loaded, prepared.task, batch) for way in (needed, full_rows))
            times.append(ours[0] / full[0])
            tokens.append(ours[1] / full[1])
            differences.append(abs(ours[2] - full[2]))
        found[f"{case} time"] = statistics.median(times[1:])
        found[f"{case} tokens"] = statistics.median(tokens[1:])
        found[f"{case} difference"] = f"{max(differences):.1e}"
    return found


def _timed(way: Way, loaded: Loaded, task: Task, batch: Sequence[Encoded]) -> tuple[float, int, float]:
    """Seconds, tokens read (padding counted) and loss of ``way``."""
    start = time.perf_counter()
    value, tokens = way(loaded, task, batch)
    return time.perf_counter() - start, tokens, value


def needed(loaded: Loaded, task: Task, encoded: Sequence[Encoded]) -> tuple[float, int]:
    """The loss as zoft computes it, and the tokens that the model reads."""
    model, filler = loaded.model, tasks.pad_id(loaded.tokenizer)
    batch = tasks.collate(encoded, filler, model.device, length_step(model.dtype), packable(model))
    return float(tasks.loss(model, task, batch).value), batch.rows.input_ids.numel()


def full_rows(loaded: Loaded, task: Task, encoded: Sequence[Encoded]) -> tuple[float, int]:
    """The same with a full row for every choice, in plain PyTorch."""
    model, filler = loaded.model, tasks.pad_id(loaded.tokenizer)
    choices = [(one, row, target) for one in encoded for row in one.loss_rows for target in row.targets]
    texts = [[*row.ids[: target.positions[0] + 1], *target.tokens] for _, row, target in choices]
    length = -(-max(map(len, texts)) // 8) * 8
    ids = torch.tensor([[filler] * (length - len(text)) + text for text in texts], device=model.device)
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts], device=model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    log_probs = functional.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0].float()
    counts = torch.tensor([len(target.tokens) for _, _, target in choices], device=model.device)
    scored = torch.arange(length - 1, device=model.device) >= length - 1 - counts[:, None]
    sums = (log_probs * scored).sum(1)
    if task.kind != "classification":
        gold = torch.tensor([target.choice == one.label for one, _, target in choices], device=model.device)
        return float(-sums[gold].sum() / counts[gold].sum()), ids.numel()
    scores = (sums / counts).split([len(one.example.choices) for one in encoded])
    losses = [torch.logsumexp(table, 0) - table[one.label] for table, one in zip(scores, encoded, strict=True)]
    return float(torch.stack(losses).mean()), ids.numel()


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--data", type=Path, required=True, help="folder of task data")
    parser.add_argument("--task", action="append", help=f"may be repeated; default {', '.join(TASKS)}")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4, help="measured after one that warms up")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="also put the table into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
