"""``zoft compare``: methods under one budget of forward passes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from zoft.cli import options
from zoft.cli.output import Output


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command(
        cls=options.sets("zoft.compare:CompareConfig", "zoft.compare.config:MethodSpec", "zoft.deploy:FinetuneConfig"),
        epilog=options.examples(
            "zoft compare MODEL --task sst2 --method mezo --method adam --budget 2000",
            "zoft compare MODEL --task sst2 --method zoft --tuner CARD --budget 2000",
            "zoft compare MODEL --data rows.jsonl --method mezo --budget 2000 --lr 1e-5",
            "zoft compare comparison.yaml --out runs/mine --jobs 2",
            "zoft compare comparison.yaml --out runs/mine --report",
        ),
    )(compare)


def compare(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|FILE.yaml",
            show_default=False,
            help="Hub id, local folder or .gguf file; or the YAML file of a comparison.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="A built-in task, see `zoft tasks`; repeatable."),
    ] = None,
    data: options.Data = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", metavar="NAME", help="See `zoft methods`; or zero-shot, icl; repeatable."),
    ] = None,
    tuner: Annotated[str | None, typer.Option(metavar="CARD", help="Tuner card of --method zoft.")] = None,
    budget: Annotated[int | None, typer.Option(metavar="FORWARDS")] = None,
    lr: Annotated[list[float] | None, typer.Option(metavar="X", help="Learning rate tried first; repeatable.")] = None,
    extensions: Annotated[int | None, typer.Option(metavar="N")] = None,
    seeds: Annotated[list[int] | None, typer.Option(metavar="S", help="Seed of a run; repeatable.")] = None,
    batch_size: options.BatchSize = None,
    shots: options.Shots = None,
    lora: options.LoRA = None,
    prefix: options.Prefix = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that work on the runs.")] = 1,
    report: Annotated[bool, typer.Option("--report", help="Run nothing, report on the finished runs.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of all runs, see zoft finetune; repeatable."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compare methods under one budget of forward passes.

    Models x tasks x methods x learning rates x seeds. The best rate of each method is chosen on dev and its runs are
    reported on test: mean, spread and interval, wins, loss over forward passes and over time, in DIR/compare.html, .md,
    .json and .csv files.

    After Ctrl-C or a crash the same command goes on. With more tasks, methods, rates or seeds it adds their runs. Any
    number of processes may work in one DIR.
    """
    if model is None:
        ctx.fail("Missing argument 'MODEL|FILE.yaml'.")
    if tuner is not None and "zoft" not in (methods or []):
        ctx.fail("--tuner goes with --method zoft; in a file, a method has its own tuner.")
    from zoft.cli.interrupt import stopping
    from zoft.cli.progress import Display
    from zoft.cli.settings import merged, parse, read_file, resolve
    from zoft.compare import CompareConfig
    from zoft.compare import compare as run

    file = Path(model) if model.endswith((".yaml", ".yml")) else None
    given: dict[str, Any] = {key: ctx.params[key] for key in ("data", "budget", "extensions", "batch_size", "out")}
    given |= {"models": None if file else [model], "tasks": tasks or None, "lr": lr or None, "seeds": seeds or None}
    given["methods"] = _methods(methods, tuner) or None
    flags = {"shots": shots, "dtype": dtype, "device": device, "lora": lora, "prefix": prefix}
    common = {key: value for key, value in flags.items() if value is not None} | parse(settings or [])
    if common:
        described = read_file(file).get("settings") if file else None
        given["settings"] = merged(described if isinstance(described, dict) else {}, common)
    config = resolve(CompareConfig, given, None, file)
    output = Output(as_json)
    with Display(output) as display, stopping(output, lambda: True) as cancelled:
        result = run(config, jobs=jobs, report_only=report, on_event=display, cancelled=cancelled)
    _draw(output, result.rows)
    missing = f"{result.total - result.done} of {result.total}" if result.done < result.total else None
    output.result(result, {"page": result.page, "table": result.table, "missing runs": missing})


def _methods(names: list[str] | None, tuner: str | None) -> list[Any]:
    return [{"method": name, "tuner": tuner} if name == "zoft" and tuner else name for name in names or []]


def _draw(output: Output, rows: tuple[dict[str, Any], ...]) -> None:
    shown = [
        [
            row["model"],
            row["task"],
            row["method"],
            row["lr"] and f"{row['lr']:.3g}{' edge' if row['edge'] else ''}",
            "diverged" if row["loss"] is None else _estimate(row, "loss"),
            _estimate(row, "metric"),
            row["forwards"],
            f"{row['seconds']:.0f} s",
        ]
        for row in rows
    ]
    output.table(["model", "task", "method", "lr", "loss", "metric", "forwards", "time"], shown)


def _estimate(row: dict[str, Any], what: str) -> str | None:
    mean, spread = row[what], row[f"{what}_spread"]
    if mean is None:
        return None
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"
