"""The ``zoft`` command: its groups, its errors and its exit codes."""

import os
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zoft import __version__
from zoft.cli import compare, demo, info, meta, registry, run
from zoft.cli.errors import explain
from zoft.cli.interrupt import terminate_as_interrupt
from zoft.errors import Interrupted


class _Group(TyperGroup):
    """Turns an error that the user can fix into one message and exit code 1, a saved interruption into 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            if os.environ.get("ZOFT_DEBUG"):
                traceback.print_exc()
            interrupted = isinstance(error, Interrupted)
            typer.echo(f"zoft: {message}" if interrupted else f"zoft: error: {message}", err=True)
            raise typer.Exit(130 if interrupted else 1) from None


# Plain help instead of rich boxes: it keeps the line breaks of examples and fits 80 columns.
app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 88},
    epilog="\b\n"
    "Examples:\n"
    "  zoft demo\n"
    "  zoft metatrain BASE --task copa --out base.tuner.safetensors\n"
    "  zoft finetune MODEL --task sst2 --tuner base.tuner.safetensors\n"
    "  zoft finetune --help\n\n"
    "Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error that the message explains "
    "(ZOFT_DEBUG=1 adds the traceback), 2 wrong usage, 130 interrupted (Ctrl-C or SIGTERM). ZOFT_HOME "
    "holds caches (default ~/.cache/zoft); HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zoft {__version__}")
        raise typer.Exit()


@app.callback()
def _zoft(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models with forward passes only, at inference memory."""


meta.register(app)
run.register(app)
compare.register(app)
info.register(app)
registry.register(app)
demo.register(app)


def main() -> None:
    """Run the command line; exits 0, 1, 2 or 130."""
    terminate_as_interrupt()
    app()


if __name__ == "__main__":
    main()
