"""The cards that may drive a model, best first."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zoft.errors import CardError
from zoft.model.adapters import adapter_of
from zoft.model.fingerprint import architecture_of, base_hash
from zoft.model.sources import hub_id, resolve
from zoft.registry.card.card import BaseFile, Card
from zoft.registry.card.samples import sample_weights
from zoft.registry.card.schema import ALL_WEIGHTS, TrainableSpec
from zoft.registry.match.lineage import lineage
from zoft.registry.match.matching import Kind, Match, match
from zoft.registry.stores.store import Shelf
from zoft.weights.blocks import Block, architecture_hash, trainable_blocks

_ORDER: tuple[Kind, ...] = ("same base", "declared", "derivative", "unknown", "stranger", "incompatible")


@dataclass(frozen=True)
class Subject:
    """What matching asks of a model, gathered once for all cards: see `zoft.registry.match.matching.match`.

    ``base_hash`` and ``samples`` are None, and ``files`` its published weight files, where the model was not
    downloaded; ``id`` is its name on the Hub, if it came from there. With an adapter, ``blocks`` are its tensors,
    ``trainable`` says what it is, and all else is of the base.
    """

    base_hash: str | None
    blocks: Sequence[Block]
    samples: torch.Tensor | None
    lineage: Collection[str]
    files: Collection[BaseFile] = ()
    id: str | None = None
    trainable: TrainableSpec = ALL_WEIGHTS
    architecture_hash: str = ""

    @classmethod
    def of(cls, model: torch.nn.Module, folder: Path) -> "Subject":
        """Describe ``model``, loaded from ``folder`` and not yet trained; its trainable parameters are the blocks."""
        blocks, adapter = trainable_blocks(model), adapter_of(model)
        return cls(
            base_hash(folder),
            blocks,
            sample_weights(blocks),
            lineage(folder),
            id=hub_id(folder),
            trainable=TrainableSpec.of(adapter),
            architecture_hash=architecture_hash(blocks) if adapter is None else architecture_of(folder),
        )

    def match(self, card: Card) -> Match:
        """Return how ``card`` fits this model."""
        return match(card, self.base_hash, self.blocks, self.samples, self.lineage, self.files, self.id, self.trainable)


@dataclass(frozen=True)
class Found:
    """A card and where it lies: ``source`` names it to ``--tuner``, ``place`` says it to a person."""

    card: Card
    source: str
    place: str


@dataclass(frozen=True)
class Candidate(Found):
    """A card that was found, and how it fits."""

    match: Match

    @property
    def digest(self) -> str:
        """Digest of the card."""
        return self.card.digest


def in_store(store: Shelf) -> list[Found]:
    """Return the readable cards of ``store``, newest first."""
    return [Found(card, digest, f"in {store.place}") for digest, card in store.cards()]


def rank(found: Iterable[Found], subject: Subject) -> list[Candidate]:
    """Return ``found`` by how it fits: nearest kind of match first, then by evidence, then as it came; each card once.

    Evidence counts by what the tuner gained over MeZO; a card with evidence goes before one that has none.
    """
    distinct: dict[str, Found] = {}
    for one in found:
        distinct.setdefault(one.card.digest, one)
    every = [Candidate(one.card, one.source, one.place, subject.match(one.card)) for one in distinct.values()]
    return sorted(every, key=_key)


def candidates(store: Shelf, subject: Subject) -> list[Candidate]:
    """Return the readable cards of ``store``, best first; equals are ordered new before old."""
    return rank(in_store(store), subject)


def evidence_gain(card: Card) -> float | None:
    """Return by how much the tuner ended below MeZO, in the units of the loss; a mean over tasks and seeds.

    Both count at their best learning rate in the longest runs, the tuner at the card's strength. None if no pair of
    runs compares them.
    """
    strength, rows = card.metadata.network.strength, card.metadata.longest_runs
    tuner = "tuner" if strength == 1 else f"tuner^{strength:g}" if strength else "mezo"
    best: dict[tuple[str, str, int], float] = {}
    for row in rows:
        if row.loss is not None:
            key = (row.name, row.task, row.seed)
            best[key] = min(row.loss, best.get(key, row.loss))
    gains = [
        loss - best[tuner, task, seed]
        for (name, task, seed), loss in best.items()
        if name == "mezo" and (tuner, task, seed) in best
    ]
    return sum(gains) / len(gains) if gains else None


def _key(one: Candidate) -> tuple[int, bool, float]:
    gain = evidence_gain(one.card)
    return _ORDER.index(one.match.kind), not one.card.metadata.evidence, -(gain or 0.0)


def best_of(every: Sequence[Candidate], looked_in: str) -> Candidate:
    """Return the first of ``every`` if it fits without force; else `CardError`, which says what came nearest."""
    if every and every[0].match.fits:
        return every[0]
    nearest = f"; the nearest, {every[0].digest[:16]}: {every[0].match.explanation}" if every else ""
    raise CardError(
        f"none of the {len(every)} cards in {looked_in} fits the model{nearest}. Add one (zoft registry add CARD), "
        "or make one (zoft metatrain MODEL)"
    )


def choose(store: Shelf, subject: Subject) -> Candidate:
    """Return the best card of ``store`` that fits without force; `CardError` if there is none.

    >>> chosen = choose(Store(), Subject.of(loaded.model, loaded.path))  # doctest: +SKIP
    >>> chosen.match.explanation  # doctest: +SKIP
    'same base: the card was made for these weights (org/base, 5c1f0a77d2e94b31)'
    """
    return best_of(candidates(store, subject), store.place)


def check_base(card: Card, model: str) -> None:
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
