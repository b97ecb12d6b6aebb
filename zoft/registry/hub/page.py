"""The page of a card on the Hub: its README, with front matter to search by.

zoft writes the part between two marks anew with every push. Text outside of the marks and fields of the front matter
that zoft does not set are kept.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import CardData, RepoCard

from zoft.errors import CardError
from zoft.optim import get_method
from zoft.registry.card.evidence import Evidence
from zoft.registry.card.file import Card
from zoft.registry.card.networks import first_scales
from zoft.registry.card.picture import draw_text
from zoft.registry.card.schema import EvidenceRow
from zoft.registry.hub.client import HubName

BEGIN = "<!-- zoft: begin. Written by `zoft registry push`; what stands outside of these two marks is yours. -->"
END = "<!-- zoft: end -->"
TAG = "zoft-tuner"
_MARKED = re.compile(r"\A(.*)<!-- zoft: begin\b[^>]*-->.*<!-- zoft: end -->(.*)\Z", re.DOTALL)
_SHOWN = 16  # characters of a hash
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)


_MARKUP = re.compile(r"[\\`*\[\]]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w)")


def prose(text: str) -> str:
    """Return ``text`` of a card as one line of Markdown that shows it and does nothing else: no tag, link or mark.

    >>> prose("better <!-- zoft: end --> ![x](http://t) 0.5 < 0.6")
    'better &lt;!-- zoft: end --> !\\\\[x\\\\](http://t) 0.5 < 0.6'
    """
    line = _MARKUP.sub(lambda found: _ESCAPED.get(found[0], f"\\{found[0]}"), " ".join(text.split()))
    number = re.match(r"\d{1,9}(?=[.)](?:\s|$))", line)
    if number is not None:
        return f"{number[0]}\\{line[number.end() :]}"
    return f"\\{line}" if re.match(r"[#>=~:|]|[-+](?!\d)", line) else line


_ESCAPED = {"<": "&lt;", "&": "&amp;"}


def code(text: str) -> str:
    """Return ``text`` of a card for a code span or block: on one line, without its delimiter and without a comment."""
    return " ".join(text.split()).replace("`", "'").replace("<!--", "<! --")


_TEMPLATES.filters |= {"prose": prose, "code": code}


@dataclass(frozen=True)
class Publication:
    """How a card is published: the repository, the licence and the Hub id of the base (None: as found)."""

    repo: str
    license: str | None = None
    base_model: str | None = None


def hash_tags(base_hash: str | None, architecture_hash: str) -> list[str]:
    """Return the tags a card is found by: of the first 16 characters of base hash and architecture hash."""
    base = [f"zoft-base-{base_hash[:_SHOWN]}"] if base_hash else []
    return [*base, f"zoft-arch-{architecture_hash[:_SHOWN]}"]


def render(card: Card, publication: Publication, existing: str = "") -> str:
    """Return the README of ``card`` with the hand-written parts of ``existing``, the README to replace.

    Raises:
        CardError: the front matter or the marks of ``existing`` are broken, so the hand-written parts are unknown.
    """
    fields, body = _split(existing)
    fields = _front_matter(card, publication, fields)
    before, after = _hand_written(body)
    page = "\n".join([BEGIN, "", _page(card, publication, fields), END])
    return f"---\n{CardData(**fields).to_yaml()}\n---\n{before}{page}{after}"


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and the page below it."""
    if not text.lstrip().startswith("---"):
        return {}, text
    try:
        page = RepoCard(text)  # not ModelCard, which rewrites fields such as ``model-index``
    except yaml.YAMLError as error:
        raise CardError(
            f"the front matter of the README on the Hub is not YAML ({_line(error)}); fix it there, then push"
        ) from error
    except (ValueError, TypeError) as error:
        raise CardError(
            "the front matter of the README on the Hub is not a mapping of names to values; fix it there, then push"
        ) from error
    return page.data.to_dict(), page.text


def _hand_written(body: str) -> tuple[str, str]:
    """The text before and after the marks; without marks all of it comes after."""
    marks = [body.count(mark) for mark in ("<!-- zoft: begin", "<!-- zoft: end -->")]
    if marks == [0, 0]:
        return "\n", f"\n\n{body.lstrip()}" if body.strip() else "\n"
    marked = _MARKED.match(body)
    if marks != [1, 1] or marked is None:
        raise CardError(
            "the existing README does not have both marks of zoft exactly once, so its hand-written parts are unknown; "
            f"put back {BEGIN!r} and {END!r}, or delete both"
        )
    return marked[1], marked[2]


def _front_matter(card: Card, publication: Publication, existing: dict[str, Any]) -> dict[str, Any]:
    spec = card.metadata.base
    base = publication.base_model or (spec.id if HubName.of(spec.id) else None)
    tags = existing.get("tags") or []
    kept = [tag for tag in (tags if isinstance(tags, list) else [tags]) if not _is_ours(tag)]
    ours: dict[str, Any] = {"library_name": "zoft"}
    if publication.license:
        ours["license"] = publication.license
    if base:
        ours["base_model"] = base
    if base or "base_model" in existing:
        ours["base_model_relation"] = "adapter"  # the closest of the Hub's values
    ours["tags"] = [TAG, *hash_tags(spec.hash, spec.architecture_hash), *kept]
    return existing | ours


def _is_ours(tag: object) -> bool:
    return tag == TAG or (isinstance(tag, str) and tag.startswith(("zoft-base-", "zoft-arch-")))


def _page(card: Card, publication: Publication, fields: dict[str, Any]) -> str:
    metadata, published = card.metadata, get_method("zoft").settings()
    base_model = _plain_id(fields.get("base_model"))
    return _TEMPLATES.get_template("page.md.jinja").render(
        card=metadata,
        digest=card.digest,
        verdict=prose(metadata.verdict[:1].upper() + metadata.verdict[1:]),
        repo=publication.repo,
        base_model=base_model,
        command_model=base_model or _plain_id(metadata.base.id),
        license=fields.get("license"),
        networks=_networks(card),
        lr=metadata.recommended.lr or published.lr,
        eps=metadata.recommended.eps or published.eps,
        rows=[_cells(row) for row in Evidence(metadata.longest_runs).best()],
        scales=_scales(card),
    )


def _plain_id(value: object) -> str | None:
    """``value`` if it is a Hub id without a revision: only such a name stands in a command to copy."""
    name = HubName.of(value) if isinstance(value, str) else None
    return name.repo if name is not None and name.revision is None else None


def _cells(row: EvidenceRow) -> list[str]:
    metric = "" if row.metric is None else f"{row.metric:.4f} ({row.metric_name})"
    cells = [row.name, row.task, row.split, f"{row.lr:.3g}", f"{row.forwards:,}", str(row.seed)]
    cells += [_number(row.loss_start), _number(row.loss), metric]
    return [prose(cell).replace("|", "\\|") for cell in cells]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _scales(card: Card) -> str:
    """The picture of the scales; empty if the weights of the base are not known."""
    if card.metadata.base.hash is None:
        return ""
    return draw_text([block.name for block in card.metadata.blocks], first_scales(card).tolist())


def _networks(card: Card) -> str:
    network = card.metadata.network
    counts = " and ".join(f"{len(level.groups)} by {level.granularity}" for level in network.levels)
    return f"small networks ({counts}, width {network.hidden}, strength {network.strength:g})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
