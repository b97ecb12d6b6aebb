"""Tuners, frozen, on tasks that their meta-training has not seen, against MeZO and the controls.

    python -m benchmarks.transfer --model M --data DIR --work FOLDER [--setting small|full] [--report]

Every method at the best of one grid of learning rates (factor 3; it grows while the best is at its edge), on every task
and seed: dev loss over forward passes. A run is one JSON file in FOLDER/cells, a tuner one meta-training in
FOLDER/tuners. Start the command again after a kill, with more tasks, methods or seeds, or beside itself in as many
processes as there are devices: nothing is done twice. ``--report`` prints what is there. The table, with everything in
``transfer.json`` and the curves in ``transfer.png``, is written when all is done.

    python -m benchmarks.transfer --model M --data DIR --work FOLDER --tuner CARD --task snli

drives a card at hand instead of learning one; the energy control then takes the tasks that the card was learned on.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {
        "task": ["vader_movie", "snli", "vader_tweets"],
        "method": ["mezo", "energy", "tuner"],
        "trained_on": ["copa"],
        "seeds": 1,
        "steps": 100,
        "meta_steps": 160,
        "checks": 4,
    },
    "full": {
        "task": None,  # all tasks in the folder
        "method": ["mezo", "energy", "paper", "tuner", "paper-no-reset", "paper-layer", "paper-no-normalise"],
        "trained_on": ["copa", "copa,sst2,boolq"],
        "seeds": 3,
        "steps": 500,
        "meta_steps": 400,
        "checks": 8,
    },
}


def main() -> None:
    arguments = _parsed()
    from benchmarks.transfer.comparison import Comparison
    from zoft.errors import ZoftError

    try:
        comparison = Comparison(arguments, say=_say)
        if not arguments.report:
            comparison.run()
    except ZoftError as error:
        raise SystemExit(str(error)) from error
    print(comparison.report())


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id, folder or .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--work", type=Path, required=True, help="folder of tuners and runs")
    parser.add_argument("--setting", choices=list(SETTINGS), default="small", help="defaults of all below")
    parser.add_argument("--task", action="append", help="task to fine-tune on; may be repeated")
    parser.add_argument("--method", action="append", help="mezo, energy, tuner, paper ..; may be repeated")
    parser.add_argument(
        "--trained-on", action="append", metavar="T[,T]", help="tasks of a meta-training; may be repeated"
    )
    parser.add_argument("--tuner", type=Path, action="append", help="card of this base, instead of learning one")
    parser.add_argument("--seeds", type=int, help="runs use seeds 1 to N")
    parser.add_argument("--steps", type=int, help="of a run; two forwards each")
    parser.add_argument("--meta-steps", type=int, help="points of a meta-training")
    parser.add_argument("--checks", type=int, help="evaluations of a run beside its start")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--train-size", type=int, default=1000)
    parser.add_argument("--dev-size", type=int, default=64)
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the computation; weights are fp32"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--report", action="store_true", help="run nothing, print the tables of the finished cells")
    arguments = parser.parse_args()
    for key, value in SETTINGS[arguments.setting].items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    return arguments


if __name__ == "__main__":
    main()
