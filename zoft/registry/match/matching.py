"""Match a tuner card with a model: same base, declared or measured derivative, stranger, or incompatible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from zoft.errors import CardError
from zoft.model.adapters import MODES
from zoft.model.fingerprint import base_hash
from zoft.model.sources import resolve
from zoft.registry.card.file import Card
from zoft.registry.card.schema import BlockSpec, TrainableSpec, TunerCard
from zoft.registry.match.identity import ModelIdentity
from zoft.weights.blocks import Block

DERIVATIVE = 0.8  # correlation; a fine-tune has about 0.98, a stranger of the same architecture about 0.03
SAME = 0.99  # correlation of the same weights in any dtype
SHOWN = 10  # blocks that differ, in an error
Kind = Literal["same base", "declared", "derivative", "unknown", "stranger", "incompatible"]


@dataclass(frozen=True)
class BlockMapping:
    """The row of a card for each block of a model; None for a block that the card does not know.

    ``resized`` blocks have another vocabulary size and keep their row; ``clashing`` ones have the name of a block of
    the card and another shape; ``missing`` are the card's blocks that the model lacks.
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

    ``correlation`` is None where it cannot be measured: no samples, or none that vary within a block.
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
        """Raise `CardError` unless the card fits; ``force`` accepts a stranger, never an incompatible card."""
        if self.fits or (force and self.kind == "stranger"):
            return
        advice = " (--force uses it anyway)" if self.kind == "stranger" else ""
        lines = self.difference.splitlines()
        if len(lines) > SHOWN:
            lines[SHOWN:] = [f"... and {len(lines) - SHOWN} more"]
        raise CardError("\n".join([self.explanation + advice, *lines]))


def match(card: Card, model: ModelIdentity) -> Match:
    """Return how ``card`` fits ``model``.

    Decided in this order: blocks that cannot be mapped; the same base hash, or the same published files; the
    `correlation` of the model's sampled weights with those in the card, where it can be measured; a declared lineage
    that names the card's base. A measured correlation below `DERIVATIVE` makes the card a stranger, whatever card and
    model declare. A model that was not downloaded and is not declared stays unknown until it is.

    >>> found = match(card, ModelIdentity.of(loaded.model, loaded.path))  # doctest: +SKIP
    >>> found.explanation  # doctest: +SKIP
    'derivative of org/base: sampled weights correlate 0.981 (at least 0.8 expected)'
    """
    mapping = map_blocks(card.metadata.blocks, model.blocks)
    measured = _measure(card, model, mapping)
    reason = _obstacle(card, model, mapping, measured)
    difference = _difference(card, model.blocks, mapping)
    if reason:
        return Match("incompatible", reason, difference, measured, mapping)
    kind, text = _relation(card, model, measured)
    return Match(kind, "; ".join([text, *_notes(mapping)]), difference, measured, mapping)


def verify_base(card: Card, model: str) -> None:
    """Raise `CardError` unless ``model`` (Hub id, folder or ``.gguf`` file) has the weights of the card's base."""
    expected, found = card.metadata.base.hash, base_hash(resolve(model).path)
    if expected is None:
        raise CardError(
            f"the card was made from the architecture of {card.metadata.base.id} alone; it names no base hash"
        )
    if found != expected:
        raise CardError(
            f"{model} is not the base of this card, or has changed since: its base hash is {found[:16]}, the card was "
            f"made for {expected[:16]} ({card.metadata.base.id}); see how it fits: zoft registry match {model}"
        )


def map_blocks(known: Sequence[BlockSpec], blocks: Sequence[Block]) -> BlockMapping:
    """Map ``blocks`` to the rows of ``known`` by name and shape; embedding and head may differ in vocabulary size."""
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


def correlation(first: torch.Tensor, second: torch.Tensor, counted: torch.Tensor | None = None) -> float | None:
    """Return the correlation of two ``(n, 16)`` samples, each block standardised on its own.

    Blocks whose samples are all equal on either side (norms of ones, biases of zeros) are left out; None if no block is
    left. Blocks that are ``counted`` and vary in ``second`` alone have correlation 0: a card cannot evade the
    measurement by samples that are all equal. Without the standardisation, one block of large weights would decide.

    >>> correlation(torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[10.0, 30.0], [1.0, 2.0]]))
    1.0
    """
    first, second = first.double(), second.double()
    one, other = first.amax(1) > first.amin(1), second.amax(1) > second.amin(1)
    spread = other & (one if counted is None else one | counted)
    if not bool(spread.any()):
        return None
    return float((_standardise(first[spread]) * _standardise(second[spread])).mean())


def _standardise(rows: torch.Tensor) -> torch.Tensor:
    """Rows of mean 0 and variance 1; zeros for a row of equal numbers."""
    centred = rows - rows.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(rows.amax(1, keepdim=True) > rows.amin(1, keepdim=True), centred / deviation, 0.0)


def _vocabularies(known: Sequence[BlockSpec], blocks: Sequence[Block]) -> set[tuple[int, int]]:
    """Old and new number of rows of the matrices outside of layers that differ only in their rows."""
    shape_of = {block.name: block.shape for block in known}
    return {
        (shape_of[block.name][0], block.shape[0])
        for block in blocks
        if block.name in shape_of and _is_vocabulary(block.name, shape_of[block.name], block.shape)
    }


def _is_vocabulary(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    in_layer = any(part.isdigit() for part in name.split("."))
    return not in_layer and len(old) == len(new) == 2 and old[1] == new[1]


def _compare(known: BlockSpec, block: Block, vocabularies: set[tuple[int, int]]) -> str:
    old, new = known.shape, block.shape
    if old == new:
        return "matched"
    is_bias = len(old) == len(new) == 1 and (old[0], new[0]) in vocabularies  # of a head
    return "resized" if is_bias or _is_vocabulary(block.name, old, new) else "clashing"


def _measure(card: Card, model: ModelIdentity, mapping: BlockMapping) -> float | None:
    """The correlation over matched blocks; positions depend on a block's size, so resized ones are left out."""
    known = card.tensors.get("base.samples")
    if model.samples is None or known is None or card.metadata.trainable.mode != "full":
        return None  # adapters are initialised anew for every run: no evidence of the model's origin
    same = set(mapping.matched)
    pairs = [(i, row) for i, row in enumerate(mapping.rows) if row is not None and model.blocks[i].name in same]
    if not pairs:
        return None
    matrices = torch.tensor([len(model.blocks[i].shape) > 1 for i, _ in pairs])
    return correlation(known[[row for _, row in pairs]], model.samples[[i for i, _ in pairs]], matrices)


def _obstacle(card: Card, model: ModelIdentity, mapping: BlockMapping, measured: float | None) -> str:
    """Why the card cannot be used with the model's blocks at all; empty if it can."""
    base, mode = card.metadata.base, card.metadata.trainable.mode
    other = _other_settings(card.metadata, model.trainable)
    if other and model.trainable.mode == mode:
        return f"{other}; train those, or {_REMEDY}"
    if not (mapping.matched or mapping.clashing):
        return (
            f"the card of {base.id} covers {MODES[mode]}, and none of its {len(card.metadata.blocks)} blocks is among "
            f"the model's {len(model.blocks)} ({_some([block.name for block in model.blocks])}); {_REMEDY}"
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
    same_hash = model.base_hash is not None and model.base_hash == base.hash
    if same_hash and measured is not None and measured < SAME:
        return (
            f"the card names the base hash of this model, but holds other sampled weights (correlation {measured:.2f}, "
            f"expected 1): it is damaged or was tampered with; download it again"
        )
    return ""


def _other_settings(card: TunerCard, trainable: TrainableSpec) -> str:
    """How the adapters that a card was made for differ from the ``trainable`` ones; empty if they do not."""
    made_for = card.trainable
    if trainable == made_for:
        return ""
    if trainable.mode != made_for.mode:
        return f"the card of {card.base.id} covers {MODES[made_for.mode]}, and {MODES[trainable.mode]} are trained here"
    return f"the card of {card.base.id} was made for {MODES[made_for.mode]} with {made_for.difference(trainable)}"


_REMEDY = "make a card for it: zoft metatrain MODEL, with the --lora or --prefix that the fine-tuning uses"


def _outside_matrix(card: Card, name: str) -> bool:
    """Whether ``name`` may be an embedding or head that the model ties to the other."""
    shape = next(block.shape for block in card.metadata.blocks if block.name == name)
    return _is_vocabulary(name, shape, shape)


def _relation(card: Card, model: ModelIdentity, measured: float | None) -> tuple[Kind, str]:
    base = card.metadata.base
    if base.hash is not None and model.base_hash == base.hash:
        return "same base", f"same base: the card was made for these weights ({base.id}, {base.hash[:16]})"
    if model.files and set(model.files) == set(base.files):
        return "same base", f"same base: the published files are those that the card was made for ({base.id})"
    seen = "sampled weights not compared" if measured is None else f"sampled weights correlate {measured:.3f}"
    called = base.id == model.hub_id and (base.hash is None or model.base_hash is not None)
    derived = base.id in model.lineage or base.hash in model.lineage
    if measured is not None and measured < DERIVATIVE:
        despite = ", whatever is declared" if called or derived else ""
        return "stranger", f"stranger to {base.id}: same blocks, but {seen} (at least {DERIVATIVE} expected){despite}"
    if called:
        return "declared", f"declared: the model is called as the card's base, {base.id} ({seen})"
    if derived:
        return "declared", f"declared derivative of {base.id} by the model card ({seen})"
    if measured is not None:
        return "derivative", f"derivative of {base.id}: {seen} (at least {DERIVATIVE} expected)"
    if model.base_hash is None:
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


def _difference(card: Card, blocks: Sequence[Block], mapping: BlockMapping) -> str:
    old = {block.name: block.shape for block in card.metadata.blocks}
    new = {block.name: block.shape for block in blocks}
    lines = [
        f"~ {name}: {_shape(old[name])} in the card, {_shape(new[name])} in the model"
        for name in (*mapping.clashing, *mapping.resized)
    ]
    lines += [f"- {name}: {_shape(old[name])} in the card only" for name in mapping.missing]
    lines += [f"+ {name}: {_shape(new[name])} in the model only" for name in mapping.unknown]
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
