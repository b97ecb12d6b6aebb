"""Cost of a zeroth-order step over its forwards, by size of model, batch, length and probes.

    python -m benchmarks.scaling [--model M] [--dtype bf16] [--steps 3] [--json] [--write]

One thing is varied at a time, from a Llama of 29 million weights, 8 x 40 tokens and one probe; the last row is a real
model. A step perturbs and updates every weight however many tokens it sees, so the ratio falls as a batch grows.
``--write`` puts the table into docs/performance.md.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import page
from benchmarks.models import default_model
from benchmarks.step.measure import ratios
from zoft.model.load import choose_device, load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASE = {"hidden": 512, "batch": 8, "length": 40, "probes": 1}
VARIED = {"hidden": (128, 256, 1024), "batch": (2, 32), "length": (10, 160), "probes": (4,)}


def cases() -> Iterator[dict[str, int]]:
    """The settings of every row but the last."""
    yield BASE
    for name, values in VARIED.items():
        for value in values:
            yield BASE | {name: value}


def llama(hidden: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Return a Llama of 8 layers with random weights."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=8,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype=dtype, device=device).eval()


def main() -> None:
    """Time every case and print the table."""
    arguments = _parsed()
    device = str(choose_device(arguments.device))
    rows = []
    for case in cases():
        model = llama(case["hidden"], DTYPES[arguments.dtype], device)
        rows.append(_row(model, arguments, **case))
    loaded = load(arguments.model or default_model(), dtype=arguments.dtype, device=arguments.device)
    rows.append(_row(loaded.model, arguments, **BASE | {"hidden": loaded.model.config.hidden_size}))
    text = page.table(list(rows[0]), [list(row.values()) for row in rows])
    if arguments.write:
        page.write(f"scaling {arguments.dtype}", text)
    print(json.dumps(rows) if arguments.json else text)


def _row(model: Any, arguments: argparse.Namespace, hidden: int, **case: int) -> dict[str, object]:
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {"weights": weights, **case, **ratios(model, rounds=arguments.steps, **case)}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="also put the table into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
