"""Options that several commands share, and the help of those that set a field of a configuration.

A flag that is not given is None: the setting then comes from ``--set``, the ``--config`` file or the default.
"""

import functools
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

FIELDS = Path(__file__).with_name("fields.json")  # written by `make docs`

Model = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)]
Task = Annotated[str | None, typer.Option(metavar="NAME")]
Data = Annotated[Path | None, typer.Option(metavar="PATH")]
BatchSize = Annotated[int | None, typer.Option(metavar="B")]
Dtype = Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(metavar="DTYPE")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE")]
Seed = Annotated[int | None, typer.Option(metavar="S")]
Date = Annotated[str | None, typer.Option(metavar="YYYY-MM-DD")]
Shots = Annotated[int | None, typer.Option(metavar="K")]
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
    Path | None, typer.Option("--config", metavar="FILE.yaml", help="Settings file; flags and --set override it.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its name; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]


class SettingsCommand(TyperCommand):
    """A command whose flags show the description and the default of the configuration field that they set.

    A flag with a help text of its own keeps it and gets the default.
    """

    configs: tuple[str, ...] = ()  # "module:class"; where several have a field, the first one counts

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        known = {name: field for config in reversed(self.configs) for name, field in fields().get(config, {}).items()}
        parameters: list[Any] = [one for one in self.params if one.name in known and not one.required]
        flags = {one.name: max(one.opts, key=len) for one in parameters}
        for one in parameters:
            one.help = _help(one.help, flags=flags, **known[one.name])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fail as wrong usage where an option that takes one value is given twice: the last one would win."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for one in order:
                single = not (getattr(one, "multiple", False) or getattr(one, "is_flag", False))
                if one.param_type_name == "option" and single and order.count(one) > 1:
                    ctx.fail(f"{max(one.opts, key=len)} is given {order.count(one)} times and takes one value.")
        return super().parse_args(ctx, args)


def sets(*configs: str) -> type[SettingsCommand]:
    """Return the class of a command whose flags set fields of ``configs``, each given as ``"module:class"``."""
    return type("Command", (SettingsCommand,), {"configs": configs})


@functools.cache
def fields() -> dict[str, dict[str, dict[str, str]]]:
    """Return description and default of every field, by configuration, from the generated file `FIELDS`.

    Importing the configurations would load torch, which takes seconds.
    """
    return json.loads(FIELDS.read_text(encoding="utf-8")) if FIELDS.exists() else {}


def _help(own: str | None, *, description: str, default: str, flags: dict[str, str]) -> str:
    """The help of a flag: its ``own`` text, else the description; then the default."""
    text, default = (
        re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[1]), part)
        for part in (own or f"{description[:1].upper()}{description[1:]}.", default)
    )
    return f"{text}  [default: {default}]" if default else text


def examples(*commands: str) -> str:
    """The end of a help text: ``commands`` as they are typed, one a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def require_model(ctx: typer.Context) -> None:
    """Fail as wrong usage where no source can name a model."""
    if not (ctx.params["model"] or ctx.params["settings"] or ctx.params["config_file"]):
        ctx.fail("Missing argument 'MODEL'.")
