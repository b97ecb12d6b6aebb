"""The cards of a store that may drive a model, best first."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zoft.blocks import Block, trainable_blocks
from zoft.errors import CardError
from zoft.fingerprint import base_hash
from zoft.registry.card import Card
from zoft.registry.lineage import lineage
from zoft.registry.matching import Kind, Match, match
from zoft.registry.samples import sample_weights
from zoft.registry.store import Store
from zoft.sources import resolve

_ORDER: tuple[Kind, ...] = ("same base", "declared", "derivative", "stranger", "incompatible")


@dataclass(frozen=True)
class Subject:
    """What matching asks of a model, gathered once for all cards: see `zoft.registry.matching.match`."""

    base_hash: str
    blocks: Sequence[Block]
    samples: torch.Tensor
    lineage: Collection[str]

    @classmethod
    def of(cls, model: torch.nn.Module, folder: Path) -> "Subject":
        """Describe ``model``, loaded from ``folder`` and not yet trained; its trainable parameters are the blocks."""
        blocks = trainable_blocks(model)
        return cls(base_hash(folder), blocks, sample_weights(blocks), lineage(folder))

    def match(self, card: Card) -> Match:
        """Return how ``card`` fits this model."""
        return match(card, self.base_hash, self.blocks, self.samples, self.lineage)


@dataclass(frozen=True)
class Candidate:
    """A card of the store and how it fits."""

    digest: str
    card: Card
    match: Match


def candidates(store: Store, subject: Subject) -> list[Candidate]:
    """Return the readable cards of ``store``: nearest kind of match first, then cards with evidence, then new ones."""
    found = []
    for entry in store.entries():  # newest first, which a stable sort keeps
        if entry.problem is None:
            card = store.get(entry.digest)
            found.append(Candidate(entry.digest, card, subject.match(card)))
    return sorted(found, key=lambda one: (_ORDER.index(one.match.kind), not one.card.metadata.evidence))


def choose(store: Store, subject: Subject) -> Candidate:
    """Return the best card that fits without force, as ``--tuner auto`` does; `CardError` if there is none.

    >>> chosen = choose(Store(), Subject.of(loaded.model, loaded.path))  # doctest: +SKIP
    >>> chosen.match.explanation  # doctest: +SKIP
    'same base: the card was made for these weights (org/base, 5c1f0a77d2e94b31)'
    """
    every = candidates(store, subject)
    if every and every[0].match.fits:
        return every[0]
    nearest = f"; the nearest, {every[0].digest[:16]}: {every[0].match.explanation}" if every else ""
    raise CardError(
        f"none of the {len(every)} cards in {store.folder} fits the model{nearest}. Add one (zoft registry add CARD), "
        "or make one (zoft metatrain MODEL)"
    )


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
