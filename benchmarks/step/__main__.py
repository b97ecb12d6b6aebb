"""How much a zeroth-order step costs beyond its two forward passes.

    python -m benchmarks.step [--model M] [--dtype bf16] [--batch 8] [--length 40] [--steps 5] [--json]

Bare forwards, zoft's step and a naive MeZO step (four in-place sweeps with a fresh generator, as the published codes
do it) are timed in turn, round after round, and compared as ratios of medians. Logits of every position are computed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.models import default_model
from zoft import models
from zoft.optim import MeZO


def main() -> None:
    """Time and print."""
    arguments = _parsed()
    loaded = models.load(arguments.model or default_model(), dtype=arguments.dtype, device=arguments.device)
    times = _timed(loaded, arguments)
    forwards = 2 * times["forward"]
    found = {
        "device": loaded.model.device.type,
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "length": arguments.length,
        "ratio": (times["measure"] + times["apply"]) / forwards,
        "ratio_measure": times["measure"] / forwards,
        "ratio_apply": times["apply"] / forwards,
        "ratio_naive": times["naive"] / forwards,
        "forward_seconds": times["forward"],
    }
    if arguments.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:16} {value:.3f}" if isinstance(value, float) else f"{key:16} {value}")


def _timed(loaded: models.Loaded, arguments: argparse.Namespace) -> dict[str, float]:
    model = loaded.model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, model.config.vocab_size - 100, (arguments.batch, arguments.length), generator=generator)
    ids = ids.to(model.device)
    optimizer = MeZO(model, lr=1e-7, eps=1e-3)

    def closure() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def apply() -> None:
        optimizer.apply(record)

    with torch.no_grad():
        record = optimizer.measure(closure)
        parts: dict[str, Callable[[], object]] = {
            "forward": closure,
            "measure": lambda: optimizer.measure(closure),
            "apply": apply,
            "naive": lambda: naive_step(list(model.parameters()), closure, lr=1e-7, eps=1e-3, seed=1),
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(arguments.steps + 1):
            record = optimizer.measure(closure)
            for name, part in parts.items():
                seconds[name].append(_seconds(part, model.device))
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def naive_step(
    parameters: list[torch.nn.Parameter], closure: Callable[[], torch.Tensor], *, lr: float, eps: float, seed: int
) -> None:
    """A MeZO step as in arXiv 2305.17333, algorithm 1: walk +eps, -2 eps, +eps, then update, z drawn anew each time."""

    def sweep(scale: float) -> None:
        generator = torch.Generator(parameters[0].device).manual_seed(seed)
        for parameter in parameters:
            z = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            parameter.add_(z, alpha=scale)

    sweep(eps)
    positive = closure().item()
    sweep(-2 * eps)
    negative = closure().item()
    sweep(eps)
    sweep(-lr * (positive - negative) / (2 * eps))


def _seconds(part: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
