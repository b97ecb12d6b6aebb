"""Lists and model hashes: ``zoft tasks``, ``zoft methods``, ``zoft fingerprint``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import options
from zoft.cli.output import Output

if TYPE_CHECKING:
    from zoft.optim import Method


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command(epilog=options.examples("zoft tasks", "zoft tasks --json | jq -r '.tasks[].name'"))(tasks)
    app.command(epilog=options.examples("zoft methods", "zoft methods --json"))(methods)
    app.command(
        epilog=options.examples(
            "zoft fingerprint HuggingFaceTB/SmolLM2-135M-Instruct",
            "zoft fingerprint ./checkpoint --blocks",
            "zoft fingerprint model.gguf --json | jq -r .base_hash",
        )
    )(fingerprint)


def tasks(as_json: options.Json = False) -> None:
    """List the built-in tasks.

    Source: the data set on the Hugging Face Hub that the rows come from without --data. Masked: the prompt for masked
    language models, where the task has one.
    """
    from zoft.tasks import CLOZES, TASKS

    rows = [
        {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric,
            "masked": CLOZES[task.name][0] if task.name in CLOZES else None,
            "source": task.source,
        }
        for task in TASKS.values()
    ]
    Output(as_json).rows("tasks", rows)


def methods(as_json: options.Json = False) -> None:
    """List the zeroth-order methods.

    With the learning rate, the probe radius eps and the options (--set options.NAME=VALUE) that were published for full
    fine-tuning; --json adds those for LoRA and prefixes. docs/methods.md describes each method and its differences from
    the published code.
    """
    from zoft.optim import METHODS

    rows = [
        {
            "name": method.name,
            "lr": method.settings().lr,
            "eps": method.settings().eps,
            **({"options": options, "adapters": _for_adapters(method)} if as_json else {}),
            "summary": method.summary if as_json else "\n".join([method.summary, *_shown(options)]),
            "source": method.source,
        }
        for method in METHODS.values()
        for options in [method.options({})]
    ]
    Output(as_json).rows("methods", rows)


def _for_adapters(method: "Method") -> dict[str, Any]:
    published = {"lora": method.settings("lora"), "prefix": method.settings("prefix")}
    return {mode: {"lr": settings.lr, "eps": settings.eps} for mode, settings in published.items()}


def _word(value: Any) -> str:
    return " and ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def _shown(options: dict[str, Any]) -> list[str]:
    """Options with their defaults, as on the command line."""
    words = {None: "null", True: "true", False: "false"}
    return [
        f"  {name}={words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in options.items()
    ]


def fingerprint(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or .gguf file.")],
    blocks: Annotated[bool, typer.Option("--blocks", help="List every block on stderr.")] = False,
    as_json: options.Json = False,
) -> None:
    """Print the hashes that identify a model.

    Two checkpoints with the same base hash hold the same weights, however they are sharded; a tuner is made for one
    base hash. No weights are loaded into memory; the hash is cached.
    """
    from zoft.model.fingerprint import fingerprint as compute

    output = Output(as_json)
    found = compute(model)
    if blocks:
        output.table(
            ["block", "shape", "weights"],
            [[block.name, "x".join(map(str, block.shape)), block.size] for block in found.blocks],
        )
    output.result(
        found,
        {
            "base hash": found.base_hash,
            "architecture hash": found.architecture_hash,
            "stored dtype": found.stored_dtype,
            "weights": found.parameters,
            "blocks": len(found.blocks),
            "adapter": found.adapter and ", ".join(f"{key} {_word(value)}" for key, value in found.adapter.items()),
        },
    )
