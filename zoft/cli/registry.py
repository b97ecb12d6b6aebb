"""The local store of tuner cards: ``zoft registry ls | show | verify | add | rm | match``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoft.cli import options
from zoft.cli.output import Output, score

if TYPE_CHECKING:
    from zoft.registry import Card

_CARD = typer.Argument(metavar="CARD", help="A card's file, or the first characters of its digest in the store.")
CardName = Annotated[str, _CARD]

_SHORT = 16  # characters of a hash, enough to tell cards apart


def register(app: typer.Typer) -> None:
    """Add the group ``registry`` to ``app``."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keep, inspect and match tuner cards.")
    for command, examples in (
        (ls, ["zoft registry ls", "zoft registry ls --json | jq -r '.cards[].digest'"]),
        (show, ["zoft registry show base.tuner.safetensors", "zoft registry show 5c1f0a77 --plot scales.png"]),
        (verify, ["zoft registry verify base.tuner.safetensors --base ./base"]),
        (add, ["zoft registry add base.tuner.safetensors"]),
        (rm, ["zoft registry rm 5c1f0a77"]),
        (match, ["zoft registry match ./my-checkpoint", "zoft registry match ./my-checkpoint --json"]),
    ):
        group.command(epilog=options.examples(*examples))(command)
    app.add_typer(group, name="registry")


def ls(as_json: options.Json = False) -> None:
    """List the cards in the local store, newest first."""
    from zoft.registry import Store

    output = Output(as_json)
    entries = Store().entries()
    for entry in entries:
        if entry.problem is not None:
            output.warn(f"{entry.problem}; remove it: zoft registry rm {entry.digest[:_SHORT]}")
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
    as_json: options.Json = False,
) -> None:
    """Show what a card says.

    Its base, how it was trained, its evidence, and the scale of every kind of block over depth at the first step.
    """
    from zoft.registry import open_card

    output, opened = Output(as_json), open_card(card)
    names, scales = [block.name for block in opened.metadata.blocks], _scales(opened)
    if plot is not None:
        from zoft.registry.picture import draw_png

        draw_png(names, scales, plot)
    output.result(_everything(opened, names, scales), _summary(opened))
    if not as_json:
        _details(output, opened, names, scales)


def verify(
    card: CardName,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Check as well that this is the model it was made for.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that a card is whole and belongs to its base.

    Everything in the file is checked: format, shapes, numbers, names. With --base, the weights of the model, too.
    """
    from zoft.registry import open_card
    from zoft.registry.candidates import check_base

    opened = open_card(card)
    if base is not None:
        check_base(opened, base)
    values = {"digest": opened.digest, "base": opened.metadata.base.id, "base_verified": base is not None}
    Output(as_json).result(values, {"whole": opened.digest, "base": f"{base} verified" if base else None})


def add(card: CardName, as_json: options.Json = False) -> None:
    """Add a card to the local store."""
    from zoft.registry import Store, open_card

    digest = Store().add(open_card(card))
    Output(as_json).result({"digest": digest}, {"added": digest})


def rm(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The first characters of the card's digest.")],
    as_json: options.Json = False,
) -> None:
    """Remove a card from the local store."""
    from zoft.registry import Store

    removed = Store().remove(digest)
    Output(as_json).result({"digest": removed}, {"removed": removed})


def match(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or .gguf file.")],
    as_json: options.Json = False,
) -> None:
    """List the cards in the store by how they fit a model, best first."""
    from zoft import models
    from zoft.registry import Store, Subject, candidates

    loaded = models.load(model, device="cpu")
    found = candidates(Store(), Subject.of(loaded.model, loaded.path))
    rows = [
        {
            "digest": one.digest if as_json else one.digest[:_SHORT],
            "kind": one.match.kind,
            "correlation": one.match.correlation,
            "explanation": one.match.explanation,
        }
        for one in found
    ]
    Output(as_json).rows("matches", rows)


def _scales(card: "Card") -> list[float]:
    """The scales at the first step; empty where the card does not know the weights of its base."""
    from zoft.registry import first_scales

    return first_scales(card).tolist() if card.metadata.base.hash is not None else []


def _everything(card: "Card", names: list[str], scales: list[float]) -> dict[str, Any]:
    drawn = {"scales": dict(zip(names, scales, strict=True))} if scales else {}
    return {"digest": card.digest, **card.metadata.model_dump(mode="json"), **drawn}


def _summary(card: "Card") -> dict[str, Any]:
    said = card.metadata
    levels = " + ".join(f"{len(level.groups)} by {level.granularity}" for level in said.network.levels)
    return {
        "digest": card.digest,
        "base": said.base.id,
        "base hash": said.base.hash,
        "covers": f"{said.trainable.mode}, {len(said.blocks)} blocks",
        "networks": f"{levels}, width {said.network.hidden}, strength {said.network.strength:g}",
        "meta-trained on": ", ".join(said.training.tasks) or None,
        "steps": said.training.steps,
        "recommended lr": said.recommended.lr,
        "recommended eps": said.recommended.eps,
        "verdict": said.verdict or None,
        "created": said.created,
    }


def _details(output: Output, card: "Card", names: list[str], scales: list[float]) -> None:
    from zoft.registry.picture import draw_text

    rows = card.metadata.evidence
    if rows:
        columns = ["run", "task", "split", "lr", "forwards", "seed", "loss before", "loss", "metric"]
        output.table(
            columns,
            [
                [r.name, r.task, r.split, r.lr, r.forwards, r.seed, score(r.loss_start), score(r.loss), score(r.metric)]
                for r in rows
            ],
        )
    if scales:
        output.note(draw_text(names, scales))
