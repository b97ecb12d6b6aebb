"""Test whether grouped-query attention harms zeroth-order LoRA: a model against itself with all key-value heads.

    python -m benchmarks.lora_gqa --task sst2 --data DIR --work WORK [--model M] [--steps 100] [--lr 1e-4 --lr 1e-3]

DiZO (arXiv 2502.03304) reports that zeroth-order methods with LoRA do not move the loss of Llama-3, and suspects
grouped-query attention. Here the key and value projections of a grouped model are copied to every query head: the same
function, bit for bit up to the order of sums, without groups. On both, with LoRA of rank 8 on query and value:

1. at the start: norms of the gradient by A and B, and whether slopes have the spread that they should;
2. slopes along the same directions in bf16 and float32: what of them half precision leaves;
3. runs over learning rates: dev loss before and after.

Prints JSON lines, and keeps them in WORK/rows.jsonl.
"""

import argparse
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import default_model
from zoft import tasks
from zoft.deploy import FinetuneConfig, finetune
from zoft.errors import DivergedError
from zoft.model import checkpoint
from zoft.model.adapters import LoRA
from zoft.model.load import DtypeName, load, save
from zoft.model.sources import resolve
from zoft.noise.direction import NoiseDirection
from zoft.weights.blocks import trainable_blocks
from zoft.weights.perturbed import PerturbedWeights


def main() -> None:
    arguments = _parsed()
    arguments.work.mkdir(parents=True, exist_ok=True)
    grouped = resolve(arguments.model or default_model()).path
    folders = {"grouped": grouped, "ungrouped": _ungrouped(grouped, arguments.work / "ungrouped")}
    with (arguments.work / "rows.jsonl").open("a") as file:

        def tell(**row: Any) -> None:
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
            file.flush()

        for name, folder in folders.items():
            tell(model=name, **_at_the_start(folder, arguments))
        for lr, seed in itertools.product(arguments.lr, arguments.seed or [0]):
            for name, folder in folders.items():
                tell(model=name, lr=lr, seed=seed, **_run(folder, lr, seed, arguments, name))


def _ungrouped(folder: Path, out: Path) -> Path:
    """The model in ``folder`` with a key-value head for every query head, copies of those of its group."""
    if out.exists():
        return out
    loaded = load(folder, dtype="fp32", device="cpu")
    config = loaded.model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    state = {}
    for name, tensor in loaded.model.state_dict().items():
        if ".k_proj." in name or ".v_proj." in name:
            by_head = tensor.unflatten(0, (groups, -1))
            tensor = by_head.repeat_interleave(heads // groups, dim=0).flatten(0, 1)
        state[name] = tensor
    config.num_key_value_heads = heads
    wide = type(loaded.model)(config).eval()
    wide.load_state_dict(state)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        apart = (wide(tokens).logits - loaded.model(tokens).logits).abs().max()
    assert apart < 1e-3, apart
    save(wide, loaded.tokenizer, out, dtype=checkpoint.stored_dtype(folder), card="---\n---\n")
    return out


class _Batch:
    """A model in LoRA, and its loss on one batch."""

    def __init__(self, folder: Path, dtype: DtypeName, arguments: argparse.Namespace) -> None:
        self.loaded = load(folder, dtype=dtype, device=arguments.device, adapter=LoRA(), seed=0)
        self.blocks = trainable_blocks(self.loaded.model)
        prepared = tasks.prepare(
            arguments.task,
            arguments.data,
            self.loaded.tokenizer,
            context_length=self.loaded.context_length,
            splits=("train",),
        )
        self.examples = prepared.train[: arguments.batch_size]
        self.objective = tasks.objective("loss", prepared.task, self.loaded.tokenizer, batch_size=1)

    def loss(self) -> torch.Tensor:
        return self.objective(self.loaded.model, self.examples).value

    @torch.no_grad()
    def slope(self, probe: int, eps: float) -> float:
        direction, ends = NoiseDirection(0, 0, probe, None, torch.float32), []
        for side in (eps, -eps):
            with PerturbedWeights(self.blocks, direction, side):
                ends.append(float(self.loss()))
        return (ends[0] - ends[1]) / (2 * eps)


def _at_the_start(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Norms of the gradient by kind of block, and the spread of slopes against the length of the gradient."""
    batch = _Batch(folder, "fp32", arguments)
    batch.loss().backward()
    squares: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for block in batch.blocks:
        kind = ".".join(block.name.split(".")[-4:-2])
        squares[kind] = squares.get(kind, 0.0) + float(block.parameter.grad.double().square().sum())
        sizes[kind] = sizes.get(kind, 0) + block.size
    found: dict[str, Any] = {
        "gradient": {kind: math.sqrt(square) for kind, square in squares.items()},
        "weights": sizes,
        "length": math.sqrt(sum(squares.values())),
    }
    half = _Batch(folder, "bf16", arguments)
    for eps in (1e-3, 1e-2, 1e-1):
        pairs = [(batch.slope(probe, eps), half.slope(probe, eps)) for probe in range(arguments.probes)]
        found[f"slopes at {eps:g}"] = {
            "fp32": math.sqrt(sum(a * a for a, _ in pairs) / len(pairs)),
            "bf16": math.sqrt(sum(b * b for _, b in pairs) / len(pairs)),
            "correlation": float(torch.corrcoef(torch.tensor(pairs, dtype=torch.float64).T)[0, 1]),
        }
    return found


def _run(folder: Path, lr: float, seed: int, arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    out = arguments.work / f"{name}-{lr:g}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    config = FinetuneConfig(
        model=str(folder),
        task=arguments.task,
        data=arguments.data,
        method="mezo",
        lora=True,
        lr=lr,
        seed=seed,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        eval_every=arguments.steps,
        train_size=arguments.train_size,
        dev_size=arguments.dev_size,
        test_size=1,
        dtype=arguments.dtype,
        device=arguments.device,
        keep_model=False,
        out=out,
    )
    try:
        result = finetune(config)
    except DivergedError as error:
        return {"diverged": str(error)}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    return {"start": result.eval_loss_start, "last": last, "best": result.eval_loss, "metric": result.metric}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="with grouped-query attention; default: SmolLM2 from its PyPI package")
    parser.add_argument("--task")
    parser.add_argument("--data", type=Path, required=True, help="as of zoft finetune")
    parser.add_argument("--work", type=Path, required=True, help="folder for models, runs and rows")
    parser.add_argument("--lr", type=float, action="append", default=[])
    parser.add_argument("--seed", type=int, action="append", default=[])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--probes", type=int, default=48, help="directions of the slopes at the start")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--train-size", type=int, default=1000)
    parser.add_argument("--dev-size", type=int, default=100)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
