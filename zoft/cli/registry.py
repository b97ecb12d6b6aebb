"""``zoft registry ls | show | verify | add | rm | match``: cards in a store, and how they fit a model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import options
from zoft.cli import registry_hub as hub
from zoft.cli.output import Output, decimals

if TYPE_CHECKING:
    from zoft.registry import Card, CardStore

_CARD = typer.Argument(
    metavar="CARD", help="A card's file, the first characters of its digest, or ORG/NAME[@REVISION] on the Hub."
)
CardName = Annotated[str, _CARD]
StorePlace = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="PLACE", help="Another store: a folder, or an address of fsspec (s3://bucket/tuners)."
    ),
]

_SHORT = 16  # characters of a hash, enough to tell cards apart


def register(app: typer.Typer) -> None:
    """Add the group ``registry`` to ``app``."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keep, inspect and match tuner cards.")
    commands: list[tuple[Callable[..., Any], list[str]]] = [
        (ls, ["zoft registry ls", "zoft registry ls --store s3://bucket/tuners"]),
        (show, ["zoft registry show base.tuner.safetensors", "zoft registry show org/base-tuner --plot scales.png"]),
        (verify, ["zoft registry verify base.tuner.safetensors --base ./base"]),
        (add, ["zoft registry add base.tuner.safetensors", "zoft registry add org/base-tuner --store /mnt/shared"]),
        (rm, ["zoft registry rm 5c1f0a77"]),
        (match, ["zoft registry match ./my-checkpoint", "zoft registry match org/model --json"]),
        *hub.COMMANDS,
    ]
    for command, examples in commands:
        group.command(command.__name__.rstrip("_"), epilog=options.examples(*examples))(command)
    app.add_typer(group, name="registry")


def ls(store: StorePlace = None, as_json: options.Json = False) -> None:
    """List the cards in a store, newest first."""
    from zoft.registry import how_to_remove, open_store

    output = Output(as_json)
    entries = open_store(store).entries()
    for entry in entries:
        if entry.problem is not None:
            output.warn(f"{entry.problem}; {how_to_remove(entry.digest)}")
    cards = [entry for entry in entries if entry.problem is None]
    if as_json:
        output.rows("cards", [entry.model_dump() for entry in cards])
        return
    output.rows(
        "cards",
        [
            {
                "digest": entry.digest[:_SHORT],
                "base": entry.base_id,
                "base hash": (entry.base_hash or "")[:_SHORT],
                "mode": entry.mode,
                "blocks": entry.blocks,
                "created": entry.created,
            }
            for entry in cards
        ],
    )


def show(
    card: CardName,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the scales as a picture (extra plot).")
    ] = None,
    store: StorePlace = None,
    as_json: options.Json = False,
) -> None:
    """Show a card.

    Its base, how it was trained, its evidence, and the scale of every kind of block over depth at the first step.
    """
    output, opened = Output(as_json), _open(card, store)
    names, scales = [block.name for block in opened.metadata.blocks], _scales(opened)
    if plot is not None:
        from zoft.registry import draw_png

        draw_png(names, scales, plot)
    output.result(_everything(opened, names, scales), _summary(opened))
    if not as_json:
        _details(output, opened, names, scales)


def verify(
    card: CardName,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also check that the card was made for this model.")
    ] = None,
    store: StorePlace = None,
    as_json: options.Json = False,
) -> None:
    """Check that a card is valid and belongs to its base.

    The whole file is checked: format, shapes, numbers, names. With --base, the weights of the model are, too.
    """
    from zoft.registry import verify_base

    opened = _open(card, store)
    if base is not None:
        verify_base(opened, base)
    values = {"digest": opened.digest, "base": opened.metadata.base.id, "base_verified": base is not None}
    Output(as_json).result(values, {"whole": opened.digest, "base": f"{base} verified" if base else None})


def add(card: CardName, store: StorePlace = None, as_json: options.Json = False) -> None:
    """Add a card to a store."""
    from zoft.registry import open_card, open_store

    digest = open_store(store).add(open_card(card))
    Output(as_json).result({"digest": digest}, {"added": digest})


def rm(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The first characters of the card's digest.")],
    store: StorePlace = None,
    as_json: options.Json = False,
) -> None:
    """Remove a card from a store."""
    from zoft.registry import open_store

    removed = open_store(store).remove(digest)
    Output(as_json).result({"digest": removed}, {"removed": removed})


def match(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or .gguf file.")],
    store: StorePlace = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download a model of the Hub to compare its weights.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the cards by how they fit a model, best first.

    Looks in the local store, among the cards shipped with zoft and on the Hub; with --store, only there. A model of the
    Hub that is not on this machine is recognised by its published configuration, model card and file hashes; where
    these are not enough, the match stays unknown until the model is downloaded.
    """
    from zoft.registry import ModelIdentity, discover

    output = Output(as_json)
    identity = ModelIdentity.find(model, download=download)
    found = discover(identity, _store(store), everything=True, on_note=output.note)
    rows = [
        {
            "digest": one.digest if as_json else one.digest[:_SHORT],
            "source": one.source,
            "kind": one.match.kind,
            "correlation": one.match.correlation,
            "publisher": one.publisher,
            "trusted": one.trusted,
            "explanation": one.match.explanation,
        }
        for one in found
    ]
    if as_json:
        output.rows("matches", rows)
        return
    for one, row in zip(found, rows, strict=True):
        row["source"] = one.place
    output.rows("matches", rows)


def _store(place: str | None) -> "CardStore | None":
    from zoft.registry import open_store

    return None if place is None else open_store(place)


def _open(card: str, store: str | None) -> "Card":
    from zoft.registry import open_card

    return open_card(card, _store(store))


def _scales(card: "Card") -> list[float]:
    """The scales at the first step; empty if the card does not have the weights of its base."""
    from zoft.registry import first_scales

    return first_scales(card).tolist() if card.metadata.base.hash is not None else []


def _everything(card: "Card", names: list[str], scales: list[float]) -> dict[str, Any]:
    drawn = {"scales": dict(zip(names, scales, strict=True))} if scales else {}
    return {"digest": card.digest, **card.metadata.model_dump(mode="json"), **drawn}


def _summary(card: "Card") -> dict[str, Any]:
    metadata = card.metadata
    levels = " + ".join(f"{len(level.groups)} by {level.granularity}" for level in metadata.network.levels)
    return {
        "digest": card.digest,
        "base": metadata.base.id,
        "base hash": metadata.base.hash,
        "covers": f"{metadata.trainable.mode}, {len(metadata.blocks)} blocks",
        "networks": f"{levels}, width {metadata.network.hidden}, strength {metadata.network.strength:g}",
        "meta-trained on": ", ".join(metadata.training.tasks) or None,
        "steps": metadata.training.steps,
        "recommended lr": metadata.recommended.lr,
        "found in runs of": None if metadata.recommended_steps is None else f"{metadata.recommended_steps} steps",
        "recommended eps": metadata.recommended.eps,
        "verdict": metadata.verdict or None,
        "created": metadata.created,
    }


def _details(output: Output, card: "Card", names: list[str], scales: list[float]) -> None:
    from zoft.registry import draw_text

    rows = card.metadata.evidence
    if rows:
        columns = ["run", "task", "split", "lr", "forwards", "seed", "loss before", "loss", "metric"]
        output.table(
            columns,
            [
                [r.name, r.task, r.split, r.lr, r.forwards, r.seed, *map(decimals, (r.loss_start, r.loss, r.metric))]
                for r in rows
            ],
        )
    if scales:
        output.note(draw_text(names, scales))
