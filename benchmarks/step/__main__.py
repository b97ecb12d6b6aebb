"""Cost of a zeroth-order step beyond its two forward passes.

    python -m benchmarks.step [--model M] [--dtype bf16] [--batch 8] [--length 40] [--steps 5] [--json] [--write]

Bare forwards, zoft's step by part, what a tuner adds to it and a naive MeZO step (four in-place sweeps with a fresh
generator, as the published codes do it) are timed in turn, round after round, and compared as ratios of medians to two
bare forwards. Logits of every position are computed. On a GPU a step by captured graphs is timed, too
(``ratio_graphs``; ``ratio_graphs_bare``: the bare forwards, captured). ``--write`` puts the table into
docs/performance.md.
"""

import argparse
import json

import torch

from benchmarks import page
from benchmarks.models import default_model
from benchmarks.step.measure import ratios
from zoft.model.load import load


def main() -> None:
    """Time and print."""
    arguments = _parsed()
    loaded = load(arguments.model or default_model(), dtype=arguments.dtype, device=arguments.device)
    found = {
        "device": loaded.model.device.type,
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "length": arguments.length,
        **ratios(loaded.model, batch=arguments.batch, length=arguments.length, rounds=arguments.steps),
    }
    text = page.table(list(found), [list(found.values())])
    if arguments.write:
        page.write(f"step {arguments.dtype}", text)
    print(json.dumps(found) if arguments.json else text)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="also put the table into docs/performance.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
