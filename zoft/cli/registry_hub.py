"""``zoft registry push | pull | search | import``: cards on the Hub, and tuners in the authors' format."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from zoft.cli import options
from zoft.cli.output import Output

_REPO = typer.Argument(metavar="ORG/NAME", help="Repository on the Hub.")


def push(
    card: Annotated[str, typer.Argument(metavar="CARD", help="A card's file, or the first characters of its digest.")],
    repo: Annotated[str, _REPO],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to commit to, created if necessary.  [default: main]")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Licence of the card, such as mit.  [default: that of the README]"),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Hub id of the base, if the card names a folder or a GGUF file."),
    ] = None,
    dry_run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the files to DIR instead of publishing them.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Publish a card on the Hugging Face Hub, in one commit.

    The card's file and a README: what base it is for, how to use it, what it was trained on, its evidence, its scales.
    Hand-written text outside of zoft's two marks in the README is kept by a second push.
    """
    from zoft.registry import open_card, write_folder
    from zoft.registry import push as publish

    opened = open_card(card)
    if dry_run is not None:
        write_folder(opened, repo, dry_run, license=license, base_model=base_model)
        Output(as_json).result({"digest": opened.digest, "out": dry_run}, {"written": dry_run})
        return
    pushed = publish(opened, repo, private=private, revision=revision, license=license, base_model=base_model)
    values = {"digest": opened.digest, "repo": pushed.name.repo, "commit": pushed.name.revision, "url": pushed.url}
    Output(as_json).result(values, {"published": pushed.name, "commit": pushed.url})


def pull(
    name: Annotated[str, typer.Argument(metavar="ORG/NAME[@REVISION]", help="Repository, and branch, tag or commit.")],
    as_json: options.Json = False,
) -> None:
    """Download a card from the Hub into the local store.

    It is checked like every card, and against the digest that the Hub publishes.
    """
    from zoft.registry import LocalStore
    from zoft.registry import pull as fetch

    card, at = fetch(name)
    digest = LocalStore().add(card)
    values = {"digest": digest, "repo": at.repo, "commit": at.revision, "base": card.metadata.base.id}
    Output(as_json).result(values, {"added": digest, "from": at, "base": card.metadata.base.id})


def search(
    text: Annotated[str, typer.Argument(metavar="[TEXT]", help="Part of a name, or the Hub id of a base model.")] = "",
    as_json: options.Json = False,
) -> None:
    """List the tuner cards on the Hub, most downloaded first.

    With the Hub id of a model, those that are made for it. `zoft registry match MODEL` shows how they fit.
    """
    from zoft.registry import declared_bases
    from zoft.registry import search as find

    rows = [
        {
            "repo": info.id,
            "base": ", ".join(declared_bases(info)),
            "downloads": info.downloads,
            "updated": info.last_modified and info.last_modified.date(),
        }
        for info in find(text)
    ]
    Output(as_json).rows("cards", rows)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.pth", help="A tuner as the authors released it.")],
    base: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The model it was made for: folder (with config.json), .gguf or Hub id."),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="CARD", help="The card.  [default: FILE.tuner.safetensors]")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Convert a tuner that the authors of ZO Fine-tuner released to a card.

    Their files are pickles, which can run any program; this reads them without running anything, and refuses whatever a
    tuner does not need. If the weights of the base are not on this machine, the card has only its architecture; import
    again with the weights for a card with base hash and statistics.
    """
    from zoft.registry import import_tuner, save_new

    output, path = Output(as_json), out or Path(f"{file.stem}.tuner.safetensors")
    card, notes = import_tuner(file, base)
    for note in notes:
        output.warn(note)
    save_new(card, path)
    metadata = card.metadata
    values = {
        "digest": card.digest,
        "out": path,
        "base": metadata.base.id,
        "blocks": len(metadata.blocks),
        "notes": notes,
    }
    output.result(values, {"card": path, "digest": card.digest, "verdict": metadata.verdict})


COMMANDS: tuple[tuple[Callable[..., Any], list[str]], ...] = (
    (pull, ["zoft registry pull org/base-tuner", "zoft registry pull org/base-tuner@v1 --json"]),
    (
        push,
        [
            "zoft registry push base.tuner.safetensors org/base-tuner --license mit",
            "zoft registry push 5c1f0a77 org/base-tuner --private",
            "zoft registry push 5c1f0a77 org/base-tuner --dry-run page",
        ],
    ),
    (
        import_,
        [
            "zoft registry import llama1b.pth --base meta-llama/Llama-3.2-1B",
            "zoft registry import llama1b.pth --base ./llama --out whole.safetensors",
        ],
    ),
    (search, ["zoft registry search", "zoft registry search HuggingFaceTB/SmolLM2-135M"]),
)
