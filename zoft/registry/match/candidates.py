"""Candidate: a card with how it fits a model, ranked by trust, kind of match and evidence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoft.errors import CardError, shown
from zoft.registry.card.evidence import Evidence
from zoft.registry.card.file import Card
from zoft.registry.match.identity import ModelIdentity
from zoft.registry.match.matching import Match, match
from zoft.registry.stores.store import Found, OnNote, ignore

_ORDER = ("same base", "declared", "derivative", "unmeasured", "unknown", "stranger", "incompatible")


@dataclass(frozen=True)
class Candidate(Found):
    """A card that was found, and how it fits a model.

    ``trusted`` is whether ``auto`` may use it: it is from disk, or its publisher is one that the model itself names.
    """

    match: Match
    trusted: bool = True

    @property
    def digest(self) -> str:
        """Digest of the card."""
        return self.card.digest

    @property
    def usable(self) -> bool:
        """Whether ``auto`` may use the card for this model."""
        return self.trusted and self.match.fits


def rank(
    found: Iterable[Found], model: ModelIdentity, *, trust: bool = False, on_note: OnNote = ignore
) -> list[Candidate]:
    """Return the distinct cards of ``found``, best first; with ``trust`` every publisher is trusted.

    Cards that fit come first, of these the trusted ones, of these the nearest kind of match: the same base, a
    derivative by correlation, then what is declared and not measured. Then by evidence: by the gain over MeZO; a card
    with evidence before one without. A card that cannot be compared is named to ``on_note``.
    """
    distinct: dict[str, Found] = {}
    for one in found:
        known = distinct.setdefault(one.card.digest, one)
        if known.publisher is not None and _trusted(one, model, trust) and not _trusted(known, model, trust):
            distinct[one.card.digest] = one  # the same card, found at a place that is trusted, too
    every = []
    for one in distinct.values():
        try:
            how = match(one.card, model)
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:  # one card hides no other
            on_note(f"passed over: {one.source} cannot be compared with the model ({shown(str(error))})")
            continue
        trusted = _trusted(one, model, trust)
        every.append(Candidate(one.card, one.source, one.place, how, trusted, publisher=one.publisher))
    return sorted(every, key=_key)


def _trusted(found: Found, model: ModelIdentity, trust: bool) -> bool:
    return trust or found.publisher is None or found.publisher.casefold() in model.publishers


def evidence_gain(card: Card) -> float | None:
    """Return by how much the tuner ended below MeZO, in the units of the loss; a mean over tasks and seeds.

    Each is taken at its best learning rate in the longest runs, the tuner at the card's strength. None if no pair of
    runs compares them.
    """
    label = Evidence.label("tuner", card.metadata.network.strength)
    return Evidence(card.metadata.longest_runs).gain(label)


def untrusted(ranked: Sequence[Candidate]) -> str:
    """Return a sentence about a card that fits and is not trusted, and how to use it; empty if there is none."""
    found = next((one for one in ranked if one.match.fits and not one.trusted), None)
    if found is None:
        return ""
    return (
        f"the card {found.source} fits ({found.match.explanation}), but its publisher, {found.publisher}, is not one "
        f"that the model names: use it by name (--tuner {found.source.partition('@')[0]}), or trust every publisher "
        "(--trust)"
    )


def require_usable(ranked: Sequence[Candidate], looked_in: str) -> Candidate:
    """Return the first of ``ranked`` if ``auto`` may use it; else raise `CardError`, which names the nearest."""
    if ranked and ranked[0].usable:
        return ranked[0]
    if other := untrusted(ranked):
        raise CardError(f"no card in {looked_in} may be used: {other}")
    nearest = f"; the nearest, {ranked[0].digest[:16]}: {ranked[0].match.explanation}" if ranked else ""
    raise CardError(
        f"none of the {len(ranked)} cards in {looked_in} fits the model{nearest}. Add one (zoft registry add CARD), "
        "or make one (zoft metatrain MODEL)"
    )


def _key(one: Candidate) -> tuple[bool, bool, int, bool, float]:
    gain, how = evidence_gain(one.card), one.match
    kind = "unmeasured" if how.kind == "declared" and how.correlation is None else how.kind
    nearest = _ORDER.index(kind)
    return not how.fits, not one.trusted, nearest, not one.card.metadata.evidence, -(gain or 0.0)
