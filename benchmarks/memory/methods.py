"""Memory that every method holds besides the weights, compared with its theory.

    python -m benchmarks.memory.methods [--model M] [--method NAME ...] [--dtype fp32] [--rank 2] [--json]

Each method takes three steps on one batch in a fresh process. ``held`` counts the numbers in its state and in what it
keeps to compute again, ``theory`` is the formula that docs/methods.md gives, with the sizes of this model; ``peak`` is
peak memory (RSS minus RSS after the imports on a CPU, what torch allocated at most on a GPU) over MeZO's.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.memory import measure
from benchmarks.models import default_model

if TYPE_CHECKING:  # torch and zoft are imported in the processes that are measured
    from zoft.optim import RecordOptimizer
    from zoft.weights.blocks import Block

Blocks = Sequence["Block"]

STEPS = 3
LOW_RANK = ("lozo", "lozo-m", "subzero", "tezo", "zo-muon")
OPTIONS: dict[str, dict[str, Any]] = {  # so that three steps fill all state of a method
    "zo-adamu": {"warmup": 1},
    "dizo": {"cycle": 2, "inner": 1},
    "dizo-fo": {"cycle": 2, "inner": 1},
}


def main() -> None:
    """Run every method in its own process and print the table."""
    from zoft.model.sources import resolve
    from zoft.optim import METHODS

    arguments = _parsed()
    if arguments.case:
        print(json.dumps(_case(arguments.case[0], arguments)))
        return
    arguments.model = str(resolve(arguments.model or default_model()).path)
    names = arguments.method or [name for name in METHODS if METHODS[name].optimizer.__name__ != "ZOFineTuner"]
    found = {name: _in_process(name, arguments) for name in dict.fromkeys(["mezo", *names])}
    for row in found.values():
        row["peak_over_mezo"] = row["peak_bytes"] / found["mezo"]["peak_bytes"]
    if arguments.json:
        print(json.dumps(found))
        return
    print("| method | theory | held, in d | theory, in d | peak over MeZO's |\n|---|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| `{name}` | {row['formula']} | {row['held']:.4f} | {row['theory']:.4f} | {row['peak_over_mezo']:.2f} |"
        )


def _in_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory.methods", "--case", name]
    for key in ("model", "dtype", "rank"):
        command += [f"--{key}", str(getattr(arguments, key))]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def _case(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from zoft.memory import peak_memory_bytes
    from zoft.model.load import load
    from zoft.optim import FullObjective, get_method

    before = measure.resident()
    model = load(arguments.model, dtype=arguments.dtype, fp32_vectors=True, bound_kernels=True).model
    ids = torch.arange(8 * 32).view(8, 32).to(model.device) % 1000 + 100

    method = get_method(name)

    def closure() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        if method.first_order:
            loss.backward()
        return loss

    options = OPTIONS.get(name, {}) | ({"rank": arguments.rank} if name in LOW_RANK else {})
    settings: dict[str, Any] = {} if method.first_order else {"full": FullObjective(closure, 1.0)}
    optimizer = method.make(model, lr=1e-7, options=options, **settings)
    for _ in range(STEPS):
        optimizer.step(closure)
    blocks = optimizer.blocks
    d = sum(block.size for block in blocks)
    formula, theory = THEORY[name]
    peak = peak_memory_bytes(model.device)
    return {
        "formula": formula,
        "held": sum(tensor.numel() for tensor in _tensors(_all_that_it_keeps(optimizer))) / d,
        "theory": theory(blocks, arguments.rank) / d,
        "peak_bytes": peak if torch.cuda.is_available() else peak - before,
    }


def _all_that_it_keeps(optimizer: "RecordOptimizer") -> list[Any]:
    return [optimizer.scratch, *optimizer.state.values()]


def _tensors(kept: Any) -> Iterator[Any]:
    """The tensors in nested dictionaries and tuples, each once."""
    import torch

    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, dict):
        for value in kept.values():
            yield from _tensors(value)
    elif isinstance(kept, (list, tuple)):
        for value in kept:
            yield from _tensors(value)


# -- theory: numbers held for these blocks at rank r -------------------------------------------------------------------


def _d(blocks: Blocks, rank: int) -> int:
    return sum(block.size for block in blocks)


def _matrices(blocks: Blocks, rank: int) -> Iterator[tuple[int, int]]:
    """The shapes of the blocks that have factors; a matrix with a side of at most r has none."""
    return (block.shape for block in blocks if len(block.shape) == 2 and min(block.shape) > rank)  # type: ignore[misc]


def _vectors(blocks: Blocks) -> int:
    return sum(block.size for block in blocks if len(block.shape) < 2)


def _query_and_value(blocks: Blocks, rank: int) -> int:
    return sum(block.size for block in blocks if "q_proj" in block.name or "v_proj" in block.name)


Theory = tuple[str, Callable[[Blocks, int], int]]
_NOTHING: Theory = ("0", lambda blocks, rank: 0)
_ONE_D: Theory = ("d", _d)
_BASES: Theory = ("(m + n) r", lambda blocks, rank: sum((m + n) * rank for m, n in _matrices(blocks, rank)))
_PROJECTED: Theory = ("d of query and value", _query_and_value)

THEORY: dict[str, Theory] = {
    **dict.fromkeys(("mezo", "scalar-adam", "zo-sign", "zo-conservative", "lezo", "fzoo", "zo-dap", "sgd"), _NOTHING),
    **dict.fromkeys(("mezo-momentum", "zo-adamu", "hizoo", "mezo-svrg", "zo-ldsd"), _ONE_D),
    **dict.fromkeys(("subzero", "tezo"), _BASES),
    **dict.fromkeys(("dizo", "dizo-fo"), _PROJECTED),
    **dict.fromkeys(("mezo-adam", "adam"), ("2d", lambda blocks, rank: 2 * _d(blocks, rank))),
    "sparse-mezo": ("1 a block", lambda blocks, rank: len(blocks)),
    "lozo": ("n r", lambda blocks, rank: sum(n * rank for _, n in _matrices(blocks, rank))),
    "lozo-m": (
        "(m + n) r, d of vectors",
        lambda blocks, rank: sum((m + n) * rank for m, n in _matrices(blocks, rank)) + _vectors(blocks),
    ),
    "zo-muon": ("m r", lambda blocks, rank: sum(m * rank for m, _ in _matrices(blocks, rank))),
}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id, folder or .gguf file; default SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--method", action="append", help="may be repeated; default: all but zoft")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--rank", type=int, default=2, help="of the methods of low rank")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", nargs=1, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
