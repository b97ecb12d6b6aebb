"""Zero-shot scores of a model on the data sets of a folder, as a Markdown table.

    python benchmarks/zero_shot.py MODEL DATA [--limit 100] [--split test] [--task sst2 --task rte]

One line per data set, printed as it is ready; ``--limit`` caps the examples of each, so a score of 100 has a standard
error of up to 5 points.
"""

import argparse
import time
from pathlib import Path

from zoft import tasks
from zoft.model.load import Loaded, load


def main() -> None:
    arguments = _parsed()
    loaded = load(arguments.model, dtype=arguments.dtype, device=arguments.device, bound_kernels=True)
    names = arguments.task or sorted(folder.name for folder in arguments.data.iterdir() if folder.is_dir())
    print("| task | examples | metric | score | loss | rows truncated | seconds |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        print(_line(name, loaded, arguments), flush=True)


def _line(name: str, loaded: Loaded, arguments: argparse.Namespace) -> str:
    prepared = tasks.prepare(
        name,
        arguments.data,
        loaded.tokenizer,
        context_length=loaded.context_length,
        splits=(arguments.split,),
        dev_size=arguments.limit,
        test_size=arguments.limit,
    )
    started = time.perf_counter()
    found = tasks.evaluate(
        loaded.model,
        loaded.tokenizer,
        prepared.task,
        getattr(prepared, arguments.split),
        batch_size=arguments.batch_size,
    )
    seconds = time.perf_counter() - started
    truncated = " ".join(warning.split(" ")[0] for warning in prepared.warnings) or "0"
    score, loss = f"{100 * found.metric:.1f}", f"{found.loss:.4f}"
    return f"| {name} | {found.examples} | {found.metric_name} | {score} | {loss} | {truncated} | {seconds:.0f} |"


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id, local folder or .gguf file")
    parser.add_argument("data", type=Path, help="folder of task folders, as --data")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
