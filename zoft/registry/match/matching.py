"""Whether a tuner card fits a model: same base, declared or measured derivative, stranger, or nothing of the kind."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from zoft.errors import CardError
from zoft.model.adapters import MODES
from zoft.registry.card.card import BaseFile, Card
from zoft.registry.card.schema import TrainableSpec, TunerCard

DERIVATIVE = 0.8  # correlation; a fine-tune has about 0.98, a stranger of the same architecture about 0.03
SHOWN = 10  # blocks that differ, in an error
SAME = 0.99  # of the very weights, whatever dtype they were loaded in
Kind = Literal["same base", "declared", "derivative", "unknown", "stranger", "incompatible"]


class NamedShape(Protocol):
    """A block as matching sees it: `zoft.weights.blocks.Block` and `zoft.model.fingerprint.BlockShape` are some."""

    @property
    def name(self) -> str:
        """Name in the unwrapped model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""


@dataclass(frozen=True)
class BlockMapping:
    """Which row of a card drives which block of a model; None for a block that the card does not know.

    ``resized`` blocks have another vocabulary and keep their row; ``clashing`` ones share a name with a block of the
    card and nothing else; ``missing`` are the card's blocks that the model lacks.
    """

    rows: tuple[int | None, ...]
    matched: tuple[str, ...]
    resized: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    clashing: tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """How a card fits a model. ``explanation`` is one line; ``difference`` one line for every block that differs.

    ``correlation`` is None where it was not measured: no samples, or no block of which the weights differ.
    """

    kind: Kind
    explanation: str
    difference: str
    correlation: float | None
    mapping: BlockMapping

    @property
    def fits(self) -> bool:
        """Whether the card can be used without ``--force``."""
        return self.kind in ("same base", "declared", "derivative")

    def require(self, *, force: bool = False) -> None:
        """Raise `CardError` unless the card fits; ``force`` lets a stranger pass, nothing an incompatible card."""
        if self.fits or (force and self.kind == "stranger"):
            return
        advice = " (--force uses it all the same)" if self.kind == "stranger" else ""
        lines = self.difference.splitlines()
        if len(lines) > SHOWN:
            lines[SHOWN:] = [f"... and {len(lines) - SHOWN} more"]
        raise CardError("\n".join([self.explanation + advice, *lines]))


def match(
    card: Card,
    base_hash: str | None,
    blocks: Sequence[NamedShape],
    samples: torch.Tensor | None = None,
    lineage: Collection[str] = (),
    files: Collection[BaseFile] = (),
    name: str | None = None,
    trainable: TrainableSpec | None = None,
) -> Match:
    """Return how ``card`` fits the model with these ``blocks``; ``trainable`` says what these are, if it is known.

    ``base_hash`` and ``samples`` are None for a model that was not downloaded: then its published weight ``files``
    may tell that it is the card's base, else nothing is known until it is downloaded. ``name`` is its own on the Hub.

    Decided in this order: blocks that cannot be mapped; the same base hash, or files; a declared ``lineage`` (names
    and base hashes, see `zoft.registry.match.lineage`) with the card's base in it; the `correlation` of ``samples``,
    ``(n, 16)`` from `zoft.registry.card.samples.sample_weights`, with those in the card.

    >>> found = match(card, fingerprint.base_hash, blocks, sample_weights(blocks))  # doctest: +SKIP
    >>> found.explanation  # doctest: +SKIP
    'derivative of org/base: sampled weights correlate 0.981 (at least 0.8 expected)'
    """
    mapping = map_blocks(card.metadata.blocks, blocks)
    measured = _measure(card, blocks, samples, mapping)
    reason = _obstacle(card, base_hash, blocks, mapping, measured, trainable)
    difference = _difference(card, blocks, mapping)
    if reason:
        return Match("incompatible", reason, difference, measured, mapping)
    same_files = bool(files) and set(files) == set(card.metadata.base.files)
    kind, text = _relation(card, base_hash, same_files, name, lineage, measured)
    return Match(kind, "; ".join([text, *_notes(mapping)]), difference, measured, mapping)


def map_blocks(known: Sequence[NamedShape], blocks: Sequence[NamedShape]) -> BlockMapping:
    """Map ``blocks`` to the rows of ``known`` by name and shape; embedding and head may differ in their vocabulary."""
    row_of = {block.name: row for row, block in enumerate(known)}
    rows: list[int | None] = []
    named: dict[str, list[str]] = {"matched": [], "resized": [], "unknown": [], "clashing": []}
    vocabularies = _vocabularies(known, blocks)
    for block in blocks:
        row = row_of.get(block.name)
        sort = "unknown" if row is None else _compare(known[row], block, vocabularies)
        named[sort].append(block.name)
        rows.append(row if sort in ("matched", "resized") else None)
    present = {block.name for block in blocks}
    missing = tuple(block.name for block in known if block.name not in present)
    return BlockMapping(tuple(rows), missing=missing, **{sort: tuple(names) for sort, names in named.items()})


def correlation(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Return the correlation of two ``(n, 16)`` samples, each block standardised by itself.

    Blocks whose samples are all equal in either (norms of ones, biases of zeros) say nothing and do not count; None
    if no block is left. Standardising keeps one block of large weights from deciding for all.

    >>> correlation(torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[10.0, 30.0], [1.0, 2.0]]))
    1.0
    """
    first, second = first.double(), second.double()
    spread = (first.amax(1) > first.amin(1)) & (second.amax(1) > second.amin(1))
    if not bool(spread.any()):
        return None
    return float((_standardise(first[spread]) * _standardise(second[spread])).mean())


def _standardise(rows: torch.Tensor) -> torch.Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt()


def _vocabularies(known: Sequence[NamedShape], blocks: Sequence[NamedShape]) -> set[tuple[int, int]]:
    """Old and new number of rows of the matrices outside of layers that differ in nothing else."""
    shape_of = {block.name: block.shape for block in known}
    return {
        (shape_of[block.name][0], block.shape[0])
        for block in blocks
        if block.name in shape_of and _is_vocabulary(block.name, shape_of[block.name], block.shape)
    }


def _is_vocabulary(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    in_layer = any(part.isdigit() for part in name.split("."))
    return not in_layer and len(old) == len(new) == 2 and old[1] == new[1]


def _compare(known: NamedShape, block: NamedShape, vocabularies: set[tuple[int, int]]) -> str:
    old, new = known.shape, block.shape
    if old == new:
        return "matched"
    is_bias = len(old) == len(new) == 1 and (old[0], new[0]) in vocabularies  # of a head
    return "resized" if is_bias or _is_vocabulary(block.name, old, new) else "clashing"


def _measure(
    card: Card, blocks: Sequence[NamedShape], samples: torch.Tensor | None, mapping: BlockMapping
) -> float | None:
    """The correlation over matched blocks; positions depend on a block's size, so resized ones cannot be compared."""
    known = card.tensors.get("base.samples")
    if samples is None or known is None or card.metadata.trainable.mode != "full":
        return None  # adapters are drawn anew for every run: they cannot tell where the model comes from
    same = set(mapping.matched)
    pairs = [(i, row) for i, row in enumerate(mapping.rows) if row is not None and blocks[i].name in same]
    if not pairs:
        return None
    return correlation(known[[row for _, row in pairs]], samples[[i for i, _ in pairs]])


def _obstacle(
    card: Card,
    base_hash: str | None,
    blocks: Sequence[NamedShape],
    mapping: BlockMapping,
    measured: float | None,
    trainable: TrainableSpec | None,
) -> str:
    """Why the card cannot be used with these blocks at all; empty if it can."""
    base = card.metadata.base
    other = _other_settings(card.metadata, trainable)
    if other and trainable is not None and trainable.mode == card.metadata.trainable.mode:
        return f"{other}; train those, or {_REMEDY}"
    if not (mapping.matched or mapping.clashing):
        return (
            f"the card of {base.id} covers {MODES[card.metadata.trainable.mode]}, and none of its "
            f"{len(card.metadata.blocks)} blocks is among the model's {len(blocks)} "
            f"({_some([block.name for block in blocks])}); {_REMEDY}"
        )
    if other:
        return f"{other}; {_REMEDY}"
    if mapping.clashing:
        return (
            f"the card was made for another architecture, {base.id}: {len(mapping.clashing)} blocks have another "
            f"shape ({_some(mapping.clashing)}); {_REMEDY}"
        )
    if lacking := [name for name in mapping.missing if not _outside_matrix(card, name)]:
        return (
            f"the card was made for another architecture, {base.id}: the model lacks {len(lacking)} of the card's "
            f"blocks ({_some(lacking)}); {_REMEDY}"
        )
    if base_hash is not None and base_hash == base.hash and measured is not None and measured < SAME:
        return (
            f"the card names the base hash of this model, but holds other sampled weights (correlation {measured:.2f}, "
            f"expected 1): it is damaged or was tampered with; fetch it again"
        )
    return ""


def _other_settings(card: TunerCard, trainable: TrainableSpec | None) -> str:
    """How the adapters that a card was made for differ from those that are ``trainable``; empty if they do not."""
    made_for = card.trainable
    if trainable is None or trainable == made_for:
        return ""
    if trainable.mode != made_for.mode:
        return f"the card of {card.base.id} covers {MODES[made_for.mode]}, and {MODES[trainable.mode]} are trained here"
    return f"the card of {card.base.id} was made for {MODES[made_for.mode]} with {made_for.difference(trainable)}"


_REMEDY = "make a card for it: zoft metatrain MODEL, with the --lora or --prefix that the fine-tuning uses"


def _outside_matrix(card: Card, name: str) -> bool:
    """Whether ``name`` may be an embedding or head that the model ties to the other."""
    shape = next(block.shape for block in card.metadata.blocks if block.name == name)
    return _is_vocabulary(name, shape, shape)


def _relation(
    card: Card,
    base_hash: str | None,
    same_files: bool,
    name: str | None,
    lineage: Collection[str],
    measured: float | None,
) -> tuple[Kind, str]:
    base = card.metadata.base
    if base.hash is not None and base_hash == base.hash:
        return "same base", f"same base: the card was made for these weights ({base.id}, {base.hash[:16]})"
    if same_files:
        return "same base", f"same base: the published files are those that the card was made for ({base.id})"
    seen = "sampled weights not compared" if measured is None else f"sampled weights correlate {measured:.3f}"
    if base.id == name and (base.hash is None or base_hash is not None):
        return "declared", f"declared: the model is called as the card's base, {base.id} ({seen})"
    if base.id in lineage or base.hash in lineage:
        return "declared", f"declared derivative of {base.id} by the model card ({seen})"
    if measured is not None and measured >= DERIVATIVE:
        return "derivative", f"derivative of {base.id}: {seen} (at least {DERIVATIVE} expected)"
    if base_hash is None:
        return "unknown", f"unknown until downloaded: same blocks as {base.id}, but no file that the card lists"
    return "stranger", f"stranger to {base.id}: same blocks, but {seen} (at least {DERIVATIVE} expected)"


def _notes(mapping: BlockMapping) -> list[str]:
    notes = []
    if mapping.resized:
        notes.append(f"another vocabulary in {_some(mapping.resized)}")
    if mapping.unknown:
        notes.append(
            f"sigma = 1 for {len(mapping.unknown)} blocks that the card does not know ({_some(mapping.unknown)})"
        )
    if mapping.missing:
        notes.append(f"{_some(mapping.missing)} of the card not used")
    return notes


def _difference(card: Card, blocks: Sequence[NamedShape], mapping: BlockMapping) -> str:
    old = {block.name: block.shape for block in card.metadata.blocks}
    new = {block.name: block.shape for block in blocks}
    lines = [
        f"~ {name}: {_shape(old[name])} in the card, {_shape(new[name])} in the model" for name in mapping.clashing
    ]
    lines += [
        f"~ {name}: {_shape(old[name])} in the card, {_shape(new[name])} in the model" for name in mapping.resized
    ]
    lines += [f"- {name}: {_shape(old[name])} in the card only" for name in mapping.missing]
    lines += [f"+ {name}: {_shape(new[name])} in the model only" for name in mapping.unknown]
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
