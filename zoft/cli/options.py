"""Options that several commands share, so that a flag means and says the same everywhere.

A flag that is not given is None: the setting then comes from ``--set``, the ``--config`` file or the default.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help="Hub id, local folder or .gguf file.")
]
Task = Annotated[
    str | None, typer.Option(metavar="NAME", help="A built-in task, see `zoft tasks`; without it, --data is your own.")
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="With --task: folder of NAME/{train,dev,test}.jsonl. Else: your file or folder."),
]
BatchSize = Annotated[int | None, typer.Option(metavar="B", help="Examples a batch.  [default: 16]")]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"] | None,
    typer.Option(metavar="DTYPE", help="Weights in auto (as stored), fp32, bf16 or fp16.  [default: auto]"),
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1 ...  [default: auto]")]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Of data sampling, batches and noise.  [default: 0]")]
Shots = Annotated[
    int | None,
    typer.Option(metavar="K", help="Take K train and K dev rows of every class, drawn from train by the seed."),
]
LoRA = Annotated[
    bool | None,
    typer.Option(
        "--lora", help="Train LoRA adapters (rank 8 on query and value; --set lora.rank=4 ...).", show_default=False
    ),
]
Prefix = Annotated[
    bool | None,
    typer.Option("--prefix", help="Train prefixes (5 tokens; --set prefix.tokens=10).", show_default=False),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE.yaml", help="Settings from a file; flags and --set go first.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its name; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


def examples(*commands: str) -> str:
    """The end of a help text: ``commands`` as they are typed, one a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def require_model(ctx: typer.Context) -> None:
    """Wrong usage where no source can name a model."""
    if not (ctx.params["model"] or ctx.params["settings"] or ctx.params["config_file"]):
        ctx.fail("Missing argument 'MODEL'.")
