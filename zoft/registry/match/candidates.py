"""Candidate: a card with how it fits a model; candidates are ranked by kind of match, then by evidence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoft.errors import CardError
from zoft.registry.card.evidence import Evidence
from zoft.registry.card.file import Card
from zoft.registry.match.identity import ModelIdentity
from zoft.registry.match.matching import Kind, Match, match
from zoft.registry.stores.store import Found

_ORDER: tuple[Kind, ...] = ("same base", "declared", "derivative", "unknown", "stranger", "incompatible")


@dataclass(frozen=True)
class Candidate(Found):
    """A card that was found, and how it fits a model."""

    match: Match

    @property
    def digest(self) -> str:
        """Digest of the card."""
        return self.card.digest


def rank(found: Iterable[Found], model: ModelIdentity) -> list[Candidate]:
    """Return the distinct cards of ``found``, nearest kind of match first, then by evidence, then in their order.

    Evidence is compared by the gain over MeZO; a card with evidence comes before one without.
    """
    distinct: dict[str, Found] = {}
    for one in found:
        distinct.setdefault(one.card.digest, one)
    every = [Candidate(one.card, one.source, one.place, match(one.card, model)) for one in distinct.values()]
    return sorted(every, key=_key)


def evidence_gain(card: Card) -> float | None:
    """Return by how much the tuner ended below MeZO, in the units of the loss; a mean over tasks and seeds.

    Each is taken at its best learning rate in the longest runs, the tuner at the card's strength. None if no pair of
    runs compares them.
    """
    label = Evidence.label("tuner", card.metadata.network.strength)
    return Evidence(card.metadata.longest_runs).gain(label)


def require_fitting(ranked: Sequence[Candidate], looked_in: str) -> Candidate:
    """Return the first of ``ranked`` if it fits without force; else raise `CardError`, which names the nearest."""
    if ranked and ranked[0].match.fits:
        return ranked[0]
    nearest = f"; the nearest, {ranked[0].digest[:16]}: {ranked[0].match.explanation}" if ranked else ""
    raise CardError(
        f"none of the {len(ranked)} cards in {looked_in} fits the model{nearest}. Add one (zoft registry add CARD), "
        "or make one (zoft metatrain MODEL)"
    )


def _key(one: Candidate) -> tuple[int, bool, float]:
    gain = evidence_gain(one.card)
    return _ORDER.index(one.match.kind), not one.card.metadata.evidence, -(gain or 0.0)
