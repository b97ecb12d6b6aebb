"""Stage two: ``zoft finetune``, ``zoft eval``, ``zoft replay``."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zoft.cli import options
from zoft.cli.output import Output, decimals


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command(
        cls=options.sets("zoft.deploy:FinetuneConfig"),
        epilog=options.examples(
            "zoft finetune MODEL --task sst2",
            "zoft finetune MODEL --task sst2 --tuner model.tuner.safetensors",
            "zoft finetune MODEL --task sst2 --tuner org/model-tuner",
            "zoft finetune MODEL --task sst2 --data DIR --method mezo --lr 1.6e-5",
            "zoft finetune model.gguf --data rows.jsonl --dtype fp32 --out runs/mine",
            "zoft finetune MODEL --task sst2 --method lozo --set options.rank=4",
            "zoft finetune MODEL --task sst2 --exact head --body frozen --steps 100",
            "zoft finetune MODEL --task sst2 --lora --method mezo",
            "zoft finetune MODEL --task sst2 --lora --set lora.targets=q_proj,k_proj",
            "zoft finetune MODEL --task boolq --objective accuracy --batch-size 64",
            "zoft finetune MODEL --config run.yaml --set warmup=100 --seed 1",
            "zoft finetune --config runs/mine/config.json --out runs/again",
            "zoft finetune --out runs/mine --resume",
        ),
    )(finetune)
    app.command(
        "eval",
        cls=options.sets("zoft.deploy:EvalConfig"),
        epilog=options.examples(
            "zoft eval MODEL --task sst2",
            "zoft eval runs/mine/model --task sst2 --data DIR --split dev",
            "zoft eval MODEL --data rows.jsonl --json",
        ),
    )(evaluate)
    app.command(
        epilog=options.examples(
            "zoft finetune MODEL --task sst2 --set log_displacement=true",
            "zoft displacement runs/mezo runs/dizo --out displacement.png",
            "zoft displacement runs/dizo --only v_proj --json",
        )
    )(displacement)
    app.command(
        cls=options.sets("zoft.deploy:FinetuneConfig"),
        epilog=options.examples(
            "zoft replay MODEL runs/mine --out copy",
            "zoft replay MODEL runs/mine/journal --out early --step 200",
            "zoft replay MODEL runs/mine --out copy --device-map auto",
        ),
    )(replay)


def finetune(
    ctx: typer.Context,
    model: options.Model = None,
    task: options.Task = None,
    data: options.Data = None,
    tuner: Annotated[str | None, typer.Option(metavar="CARD")] = None,
    trust: Annotated[bool | None, typer.Option("--trust")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="See `zoft methods`; lezo+mezo-adam combines two; options by --set options.NAME=VALUE.",
        ),
    ] = None,
    exact: Annotated[Literal["none", "head"] | None, typer.Option(metavar="WHAT")] = None,
    body: Annotated[Literal["zo", "frozen"] | None, typer.Option(metavar="HOW")] = None,
    lora: options.LoRA = None,
    prefix: options.Prefix = None,
    steps: Annotated[int | None, typer.Option(metavar="N")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X")] = None,
    eps: Annotated[float | None, typer.Option(metavar="X")] = None,
    batch_size: options.BatchSize = None,
    accumulate: Annotated[int | None, typer.Option(metavar="N")] = None,
    probes: Annotated[int | None, typer.Option(metavar="Q")] = None,
    schedule: Annotated[Literal["constant", "linear"] | None, typer.Option(metavar="NAME")] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X")] = None,
    objective: Annotated[
        Literal["loss", "accuracy", "f1", "em"] | None,
        typer.Option(metavar="NAME", help="What is minimised: the loss, or one minus accuracy, f1 or em."),
    ] = None,
    seed: options.Seed = None,
    date: options.Date = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    shots: options.Shots = None,
    train_size: Annotated[int | None, typer.Option(metavar="N")] = None,
    dev_size: Annotated[int | None, typer.Option(metavar="N")] = None,
    eval_every: Annotated[int | None, typer.Option(metavar="N")] = None,
    snapshot_every: Annotated[int | None, typer.Option(metavar="N")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite a run in --out; accept a card that was made for other weights."),
    ] = False,
    salvage: Annotated[
        bool,
        typer.Option(
            "--salvage",
            help="With --resume: go on before a damage of the journal, which is kept under another name.",
        ),
    ] = False,
    config_file: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model with forward passes only.

    Trains on the train split, scores dev every --eval-every steps, keeps the best weights, scores test at the end,
    and writes a Hugging Face checkpoint to DIR/model. Takes no more memory than inference. Ctrl-C or a crash loses
    nothing: --resume continues, and ends in the same weights bit for bit.

    With --lora or --prefix the model stays frozen, an adapter is trained, and DIR/model is that adapter as peft saves
    it. Learning rate and eps have their own defaults there.

    With --exact head the head, its bias and the final norm move along their exact gradient, which the logits give at no
    further forward pass; with --body frozen nothing else moves, and a step takes one forward pass.

    With neither --tuner nor --method, the best tuner card that fits the model is used, from the local store or the Hub,
    else MeZO; a message names the choice.
    """
    if salvage and not resume:
        ctx.fail("--salvage goes with --resume.")
    stored = _settings_of(out) if resume and config_file is None else None
    if stored is None:
        options.require_model(ctx)
    from zoft.cli.interrupt import stopping
    from zoft.cli.progress import Display
    from zoft.cli.settings import resolve
    from zoft.deploy import FinetuneConfig
    from zoft.deploy import finetune as run

    config = resolve(FinetuneConfig, ctx.params, settings, stored or config_file)
    output = Output(as_json)
    with Display(output) as display, stopping(output, lambda: display.started) as cancelled:
        result = run(config, resume=resume, force=force, salvage=salvage, on_event=display, cancelled=cancelled)
    output.table(
        ["", "before", "after"],
        [
            ["dev loss", decimals(result.eval_loss_start), decimals(result.eval_loss)],
            [f"dev {result.metric_name}", decimals(result.metric_start), decimals(result.metric)],
            ["test loss", None, decimals(result.test_loss)],
            [f"test {result.metric_name}", None, decimals(result.test_metric)],
        ],
    )
    shown = {"model": result.out / "model", "kept step": result.kept_step}
    output.result(result, shown | {"tuner": result.tuner and result.tuner.digest})


def evaluate(
    ctx: typer.Context,
    model: options.Model = None,
    task: options.Task = None,
    data: options.Data = None,
    split: Annotated[Literal["dev", "test"] | None, typer.Option(metavar="NAME")] = None,
    batch_size: options.BatchSize = None,
    date: options.Date = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    config_file: options.ConfigFile = None,
    settings: options.Settings = None,
    as_json: options.Json = False,
) -> None:
    """Score a model on a task.

    Prints the loss (nats per example for classification, nats per token otherwise) and the task's metric.
    """
    options.require_model(ctx)
    from zoft.cli.progress import Display
    from zoft.cli.settings import resolve
    from zoft.deploy import EvalConfig, evaluate_model

    config = resolve(EvalConfig, ctx.params, settings, config_file)
    output = Output(as_json)
    with Display(output) as display:
        result = evaluate_model(config, on_event=display)
    output.result(result, {"loss": decimals(result.eval_loss), result.metric_name: decimals(result.metric)})


def replay(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the run started from.")],
    journal: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its journal.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the fine-tuned model.")],
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Weights after step N.  [default: the kept step]")
    ] = None,
    device: options.Device = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            metavar="MAP",
            help="Spread a model that fits no single device: auto, disk, or MODULE=DEVICE,MODULE=DEVICE ...",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Rebuild fine-tuned weights from a run's journal.

    Needs the base model and the journal, no data and no forward pass. The weights equal the run's own bit for bit;
    those of the kept step are checked against the SHA-256 in the journal.
    """
    from zoft.cli.progress import Display
    from zoft.deploy import replay as rebuild

    output = Output(as_json)
    with Display(output) as display:
        result = rebuild(
            base, journal, out, step=step, device=device or "auto", device_map=device_map, on_event=display
        )
    output.result(result, {"model": result.out, "step": result.step, "checked": result.verified})


def displacement(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their journals.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw a panel for every run (extra plot).")
    ] = None,
    only: Annotated[str, typer.Option(metavar="NAME", help="Only blocks with this in their name.")] = "",
    as_json: options.Json = False,
) -> None:
    """Show how far runs moved every layer from the base.

    The length of theta_t - theta_0 by layer, at every dev evaluation of runs made with --set log_displacement=true.
    """
    from zoft.deploy.displacement import displacement as read
    from zoft.deploy.displacement import draw

    output = Output(as_json)
    found = [read(run, only) for run in runs]
    if out is not None:
        draw(found, out)
    for one in found:
        layers = list(next(iter(one.steps.values())))
        rows = [[step, *(f"{lengths[layer]:.3g}" for layer in layers)] for step, lengths in one.steps.items()]
        output.note(f"{one.run}: method {one.method}, |theta - theta_0| by layer")
        output.table(["step", *map(str, layers)], rows)
    output.result({"runs": found, "out": out}, {"picture": out})


def _settings_of(out: Path | None) -> dict[str, Any] | None:
    """The settings of the run in ``out``: resuming needs none repeated."""
    from zoft.deploy import FinetuneConfig
    from zoft.deploy.folder import stored_settings

    return stored_settings(out or FinetuneConfig.model_fields["out"].default)
