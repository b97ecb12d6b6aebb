"""The README of a card on the Hub: front matter that it is found by, and a page that a person can read.

Between two marks the page is zoft's, and written anew by every push; what stands outside of them, and every field of
the front matter that zoft does not set, stays as a person has left it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from zoft.errors import CardError
from zoft.optim import get_method
from zoft.registry.card.card import Card, EvidenceRow, Recommended
from zoft.registry.card.networks import first_scales
from zoft.registry.card.picture import draw_text
from zoft.registry.hub.client import HubName

BEGIN = "<!-- zoft: begin. Written by `zoft registry push`; what stands outside of these two marks is yours. -->"
END = "<!-- zoft: end -->"
TAG = "zoft-tuner"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)(.*)\Z", re.DOTALL)
_MARKED = re.compile(r"\A(.*)<!-- zoft: begin\b[^>]*-->.*<!-- zoft: end -->(.*)\Z", re.DOTALL)
_SHOWN = 16  # characters of a hash


@dataclass(frozen=True)
class Publication:
    """What a push says beside the card: the repository, the licence and the Hub id of the base (None: as found)."""

    repo: str
    license: str | None = None
    base_model: str | None = None


def hash_tags(base_hash: str | None, architecture_hash: str) -> list[str]:
    """Return the tags by which a card is found: of the first 16 characters of base hash and architecture hash."""
    base = [f"zoft-base-{base_hash[:_SHOWN]}"] if base_hash else []
    return [*base, f"zoft-arch-{architecture_hash[:_SHOWN]}"]


def render(card: Card, publication: Publication, existing: str = "") -> str:
    """Return the README of ``card`` with the hand-written parts of ``existing``, the page that is there now.

    Raises:
        CardError: the front matter or the marks of ``existing`` are broken, so nobody can tell what is hand-written.
    """
    data, body = _split(existing)
    data = _front_matter(card, publication, data)
    before, after = _hand_written(body)
    page = "\n".join([BEGIN, "", _page(card, publication, data), END])
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{front}---\n{before}{page}{after}"


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and the page below it."""
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    try:
        data = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        raise CardError(f"the front matter of the README on the Hub is no YAML ({_line(error)}); mend it") from error
    if not isinstance(data, dict):
        raise CardError("the front matter of the README on the Hub is no mapping of fields; mend it there, then push")
    return data, match[2]


def _hand_written(body: str) -> tuple[str, str]:
    """What stands before and after the marks; without marks all of it comes after."""
    marks = [body.count(mark) for mark in ("<!-- zoft: begin", "<!-- zoft: end -->")]
    if marks == [0, 0]:
        return "\n", f"\n\n{body.lstrip()}" if body.strip() else "\n"
    marked = _MARKED.match(body)
    if marks != [1, 1] or marked is None:
        raise CardError(
            "the README that is there does not have both marks of zoft exactly once, so what is hand-written cannot be "
            f"told; put back {BEGIN!r} and {END!r}, or delete both"
        )
    return marked[1], marked[2]


def _front_matter(card: Card, publication: Publication, existing: dict[str, Any]) -> dict[str, Any]:
    said = card.metadata
    base = publication.base_model or (said.base.id if HubName.of(said.base.id) else None)
    tags = existing.get("tags") or []
    kept = [tag for tag in (tags if isinstance(tags, list) else [tags]) if not _is_ours(tag)]
    ours: dict[str, Any] = {"library_name": "zoft"}
    if publication.license:
        ours["license"] = publication.license
    if base:
        ours["base_model"] = base
    if base or "base_model" in existing:
        ours["base_model_relation"] = "adapter"  # the closest of the Hub's values
    ours["tags"] = [TAG, *hash_tags(said.base.hash, said.base.architecture_hash), *kept]
    return existing | ours


def _is_ours(tag: object) -> bool:
    return tag == TAG or (isinstance(tag, str) and tag.startswith(("zoft-base-", "zoft-arch-")))


def _page(card: Card, publication: Publication, data: dict[str, Any]) -> str:
    said = card.metadata
    base = f"`{said.base.id}`" + (f" ({said.base.source_note})" if said.base.source_note else "")
    named = data.get("base_model")
    if named and named != said.base.id:
        base += f", a form of [{named}](https://huggingface.co/{named})" if isinstance(named, str) else ""
    sections = [
        f"# Tuner for {said.base.id}",
        f"A tuner card for {base}: {_networks(card)} that say how strongly each of its {len(said.blocks)} parameter "
        "blocks is perturbed in zeroth-order fine-tuning, with forward passes only, at the memory of inference. It "
        "drives the fine-tuning of this model and of every checkpoint derived from it. The file is data: nothing in it "
        "is executed.",
        _usage(publication.repo, named if isinstance(named, str) else said.base.id, said.recommended),
        _training(card),
        _evidence(card),
        _scales(card),
        _facts(card),
        _licence(data),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _usage(repo: str, model: str, recommended: Recommended) -> str:
    published = get_method("zoft").settings()
    lr, eps = recommended.lr or published.lr, recommended.eps or published.eps
    return f"""## How to use it

```bash
pip install zoft
zoft finetune {model} --task sst2 --tuner {repo}
```

Or, from Python:

```python
tuner = zoft.registry.load("{repo}", model)
optimizer = zoft.optim.ZOFineTuner(model, tuner, lr={lr:g}, eps={eps:g})
```

`--tuner auto` finds it for any checkpoint derived from the base."""


def _training(card: Card) -> str:
    training = card.metadata.training
    if not training.tasks and not training.steps:
        return ""
    seeds = f", seed {', '.join(map(str, training.seeds))}" if training.seeds else ""
    lines = [
        "## What it was trained on",
        f"{', '.join(training.tasks) or 'the data of its maker'}: {training.steps:,} points, {training.forwards:,} "
        f"forward passes (a backward counts two){seeds}.",
    ]
    if training.versions:
        lines.append("Made with " + ", ".join(f"{name} {of}" for name, of in sorted(training.versions.items())) + ".")
    return "\n\n".join(lines)


def _evidence(card: Card) -> str:
    said = card.metadata
    parts = ["## Evidence"]
    if said.verdict:
        parts.append(said.verdict[0].upper() + said.verdict[1:] + ("" if said.verdict.endswith(".") else "."))
    if said.evidence:
        parts.append(
            "Runs at equal forward passes on data held out of the meta-training; of every contender the best rate."
        )
        parts.append(_table(best_rows(said.longest_runs)))
    else:
        parts.append("There is none: nobody has compared this tuner with MeZO yet.")
    if said.recommended.lr is not None:
        eps = f", eps {said.recommended.eps:g}" if said.recommended.eps is not None else ""
        parts.append(f"Recommended learning rate {said.recommended.lr:g}{eps}{_found_in(card)}.")
    return "\n\n".join(parts)


def _found_in(card: Card) -> str:
    steps = card.metadata.recommended_steps
    return "" if steps is None else f", found in runs of {steps} steps; `zoft finetune` lowers it for longer ones"


def best_rows(rows: Sequence[EvidenceRow]) -> list[EvidenceRow]:
    """Return of every contender, task and seed the row with the lowest loss, in the order of the evidence."""
    best: dict[tuple[str, str, int], EvidenceRow] = {}
    for row in rows:
        key = (row.name, row.task, row.seed)
        if key not in best or _loss(row) < _loss(best[key]):
            best[key] = row
    return list(best.values())


def _loss(row: EvidenceRow) -> float:
    return float("inf") if row.loss is None else row.loss


def _table(rows: Sequence[EvidenceRow]) -> str:
    lines = [
        "| run | task | split | learning rate | forwards | seed | loss before | loss | metric |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        metric = "" if row.metric is None else f"{row.metric:.4f} ({row.metric_name})"
        cells = [row.name, row.task, row.split, f"{row.lr:.3g}", f"{row.forwards:,}", str(row.seed)]
        cells += [_number(row.loss_start), _number(row.loss), metric]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _scales(card: Card) -> str:
    if card.metadata.base.hash is None:
        return ""
    names = [block.name for block in card.metadata.blocks]
    drawn = draw_text(names, first_scales(card).tolist())
    return (
        "## Scales at the first step\n\nEvery kind of block over depth; 1 is MeZO. Before the bars stands the "
        f"geometric mean.\n\n```\n{drawn}\n```"
    )


def _facts(card: Card) -> str:
    said = card.metadata
    rows = [
        ("digest of the card", card.digest),
        ("base hash", said.base.hash or "not known: made from the configuration alone"),
        ("architecture hash", said.base.architecture_hash),
        ("blocks", f"{len(said.blocks)}, {said.trainable.mode}"),
        ("networks", _networks(card)),
        ("created", said.created.isoformat()),
    ]
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Facts\n\n| | |\n| --- | --- |\n{lines}\n\n`zoft registry show` tells all that the card says."


def _networks(card: Card) -> str:
    network = card.metadata.network
    counts = " and ".join(f"{len(level.groups)} by {level.granularity}" for level in network.levels)
    return f"small networks ({counts}, width {network.hidden}, strength {network.strength:g})"


def _licence(data: dict[str, Any]) -> str:
    named = data.get("license")
    return f"## Licence\n\n{named}" if named else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
