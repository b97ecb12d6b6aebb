"""Options that several commands share, and the help of those that set a field of a configuration.

A flag that is not given is None: the setting then comes from ``--set``, the ``--config`` file or the default.
"""

import importlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

Model = Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)]
Task = Annotated[str | None, typer.Option(metavar="NAME")]
Data = Annotated[Path | None, typer.Option(metavar="PATH")]
BatchSize = Annotated[int | None, typer.Option(metavar="B")]
Dtype = Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(metavar="DTYPE")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE")]
Seed = Annotated[int | None, typer.Option(metavar="S")]
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

    A flag with a help text of its own keeps it and gets the default. Configurations import torch, which takes seconds,
    so they are loaded when the command's help is asked for.
    """

    configs: tuple[str, ...] = ()  # "module:class"; where several have a field, the first one counts
    _described = False

    def describe(self) -> None:
        """Complete the help of every flag from the fields."""
        if self._described:
            return
        fields: dict[str, Any] = {}
        for place in reversed(self.configs):
            module, _, name = place.partition(":")
            fields |= getattr(importlib.import_module(module), name).model_fields
        parameters: list[Any] = [one for one in self.params if one.name in fields and not one.required]
        flags = {one.name: max(one.opts, key=len) for one in parameters}
        for one in parameters:
            one.help = _help(one.help, fields[one.name], flags)
        self._described = True

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        self.describe()
        super().format_help(ctx, formatter)


def sets(*configs: str) -> type[SettingsCommand]:
    """Return the class of a command whose flags set fields of ``configs``, each given as ``"module:class"``."""
    return type("Command", (SettingsCommand,), {"configs": configs})


def _help(own: str | None, field: Any, flags: dict[str, str]) -> str:
    """The help of a flag: its ``own`` text, else the description of ``field``; then the default."""
    description, _, default = (field.description or "").partition("; default: ")
    description = f"{description[:1].upper()}{description[1:]}."
    text, default = (
        re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[1]), part)
        for part in (own or description, default or _shown(field.get_default()))
    )
    return f"{text}  [default: {default}]" if default and "[default: " not in text else text


def _shown(default: Any) -> str:
    """A default as it would be typed; "" for a switch that is off and where there is none.

    >>> _shown(1e-05), _shown(0.0), _shown(("kind", "block")), _shown(False), _shown(0)
    ('1e-05', '0', 'kind,block', '', '0')
    """
    if default is None or isinstance(default, bool | dict) or repr(default) == "PydanticUndefined":
        return ""
    if isinstance(default, tuple | list):
        return ",".join(map(_shown, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def examples(*commands: str) -> str:
    """The end of a help text: ``commands`` as they are typed, one a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def require_model(ctx: typer.Context) -> None:
    """Fail as wrong usage where no source can name a model."""
    if not (ctx.params["model"] or ctx.params["settings"] or ctx.params["config_file"]):
        ctx.fail("Missing argument 'MODEL'.")
