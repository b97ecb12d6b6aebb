"""``zoft metatrain``: stage one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zoft.cli import options
from zoft.cli.output import Output, decimals

if TYPE_CHECKING:
    from zoft.metatrain import MetatrainResult
    from zoft.registry import HubName


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command(
        cls=options.sets("zoft.metatrain:MetatrainConfig"),
        epilog=options.examples(
            "zoft metatrain MODEL --task copa --task sst2 --out model.tuner.safetensors",
            "zoft metatrain MODEL --task copa --data DIR --evidence-task rte",
            "zoft metatrain MODEL --task copa --lora --out model-lora.tuner.safetensors",
            "zoft metatrain MODEL --task copa --preset paper --steps 570",
            "zoft metatrain MODEL --task copa --push org/model-tuner",
            "zoft metatrain MODEL --data rows.jsonl --steps 200 --set compare_every=0",
            "zoft metatrain --out model.tuner.safetensors --resume",
            "zoft metatrain MODEL --steps 0    # an untrained tuner, which is MeZO",
        ),
    )(metatrain)


def metatrain(
    ctx: typer.Context,
    model: options.Model = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="A built-in task, see `zoft tasks`; repeatable."),
    ] = None,
    data: options.Data = None,
    lora: options.LoRA = None,
    prefix: options.Prefix = None,
    preset: Annotated[Literal["zoft", "paper"] | None, typer.Option(metavar="NAME")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N")] = None,
    reset_every: Annotated[int | None, typer.Option(metavar="R")] = None,
    batch_size: options.BatchSize = None,
    lr: Annotated[float | None, typer.Option(metavar="X")] = None,
    eps: Annotated[float | None, typer.Option(metavar="X")] = None,
    teacher_lr: Annotated[float | None, typer.Option(metavar="X")] = None,
    probes: Annotated[int | None, typer.Option("--probes", "--directions", metavar="Q")] = None,
    granularity: Annotated[str | None, typer.Option(metavar="LEVELS")] = None,
    evidence: Annotated[int | None, typer.Option(metavar="FORWARDS")] = None,
    evidence_task: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    seed: options.Seed = None,
    dtype: Annotated[Literal["auto", "fp32", "bf16"] | None, typer.Option(metavar="DTYPE")] = None,
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Publish the card on the Hub at the end.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the job in FILE.run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing card and job.")] = False,
    config_file: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Learn a tuner for a base model, once.

    Trains the base with gradients, tries a zeroth-order step at every point, and learns the scales of the parameter
    blocks from the loss after that step. Then tests the tuner against its controls on held-out rows and writes the
    card, a file under 2 MB that drives `zoft finetune --tuner`. The card is also added to the local store.

    Everything else is in the folder FILE.run. Ctrl-C, or a file named cancel in that folder, stops after a point;
    --resume goes on from the last reset to the base, and gives the same card.
    """
    if resume and config_file is None:
        from zoft.metatrain import stored_config

        config_file = ctx.params["config_file"] = stored_config(model, out)  # so that no setting has to be repeated
    options.require_model(ctx)
    from zoft.cli.interrupt import stopping
    from zoft.cli.progress import Display
    from zoft.cli.settings import resolve
    from zoft.metatrain import MetatrainConfig
    from zoft.metatrain import metatrain as run
    from zoft.registry import HubName

    if push is not None:
        HubName.parse(push)  # fails before the training, not after it
    config = resolve(MetatrainConfig, ctx.params | {"tasks": tasks or None}, settings, config_file)
    output = Output(as_json)
    with Display(output) as display, stopping(output, lambda: display.started) as cancelled:
        result = run(config, resume=resume, force=force, on_event=display, cancelled=cancelled)
    _draw(output, result)
    shown = {"card": result.out, "verdict": result.verdict or None, "learning rate": result.lr}
    published = {} if push is None else {"pushed": str(_push(result.out, push))}
    output.result(result.public() | published, shown | published)


def _push(card: Path, repo: str) -> "HubName":
    """Publish the finished card; an error names the command that tries again."""
    from zoft.errors import CardError
    from zoft.registry import Card, push

    try:
        return push(Card.load(card), repo).name
    except CardError as error:
        raise CardError(f"{error}. The card is complete; try again: zoft registry push {card} {repo}") from error


def _draw(output: Output, result: "MetatrainResult") -> None:
    """Draw the scales at the first step and the best runs of the evidence."""
    from zoft.metatrain import best_trials
    from zoft.registry import Card, draw_text, first_scales

    card = Card.load(result.out)
    output.note(draw_text([block.name for block in card.metadata.blocks], first_scales(card).tolist()))
    if trials := best_trials(result.job):
        output.table(
            ["run", "lr", "forwards", "loss before", "loss", "metric"],
            [
                [t.label, f"{t.lr:.2g}", t.forwards, decimals(t.loss_start), decimals(t.loss), decimals(t.metric)]
                for t in trials
            ],
        )
