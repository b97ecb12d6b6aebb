"""Find the cards for a model: local ones first, then the Hub by base hash, declared lineage and architecture."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from huggingface_hub import ModelInfo, constants

from zoft.errors import CardError, ZoftError
from zoft.registry.hub.client import HubName, UnreachableError, call, get_json, repository
from zoft.registry.hub.deadline import Deadline, auto_seconds
from zoft.registry.hub.models import declared_bases
from zoft.registry.hub.page import TAG
from zoft.registry.hub.pull import pull
from zoft.registry.match.candidates import Candidate, rank
from zoft.registry.match.identity import ModelIdentity
from zoft.registry.match.lineage import LEVELS
from zoft.registry.match.matching import match
from zoft.registry.stores.local import LocalStore
from zoft.registry.stores.remote import shared_stores
from zoft.registry.stores.shipped import shipped_cards
from zoft.registry.stores.store import CardStore, Found, OnNote, ignore

T = TypeVar("T")

REPOSITORIES = 12  # read for one tag at most: anyone may publish under any tag
PUBLISHERS = 8  # asked for one tag by name, if there are more repositories than that
MOST_BASES = 32  # of one level of a lineage
PLACES = "the local store, the cards shipped with zoft and on the Hub"


def discover(
    model: ModelIdentity,
    store: CardStore | None = None,
    *,
    everything: bool = False,
    trust: bool = False,
    on_note: OnNote = ignore,
    on_wait: OnNote = ignore,
) -> list[Candidate]:
    """Return the cards for ``model``, best first: those of ``store``, by default local ones and the Hub's.

    Searched in this order: the local store, the one that ``ZOFT_STORE`` names and the cards shipped with zoft; then, on
    the Hub, cards with the tag of the base hash, with a base in the model's ``base_model`` chain, with the tag of the
    architecture hash. The search ends at the first of these with a card that is usable, unless ``everything`` is
    wanted. Usable are cards that fit and are from disk or from a publisher that the model names (its own namespace on
    the Hub and those of its bases); with ``trust`` those of every publisher.

    Servers are asked for at most `auto_seconds` in all (not if ``everything`` is wanted); what was found by then is
    ranked. ``on_wait`` receives what is waited for, ``on_note`` a sentence for each card that was passed over, and one
    if the Hub or a shared store cannot be reached, which ends the search there.

    >>> discover(ModelIdentity.of(loaded.model, loaded.path))[0].match.explanation  # doctest: +SKIP
    'same base: the card was made for these weights (org/base, 5c1f0a77d2e94b31)'
    """
    limit = None if everything else Deadline(auto_seconds())
    if store is not None:
        found = store.found(on_note) if isinstance(store, LocalStore) else _of_store(store, limit, on_note)
        return rank(found, model, trust=trust, on_note=on_note)
    found = [*_in_local_store(on_note), *_in_shared_store(limit, on_note, on_wait), *_shipped(model, on_note)]
    ranked = rank(found, model, trust=trust, on_note=on_note)
    if (_usable(ranked) and not everything) or constants.is_offline_mode():
        return ranked
    hub, problem = _Search(limit), ""
    try:
        for what, tags, identity in _stages(model, hub):
            on_wait(f"waiting for the Hub: tuner cards {what}")
            model = identity
            hub.look(tags, identity.publishers)
            ranked = rank([*found, *hub.found], identity, trust=trust)
            if _usable(ranked) and not everything:
                break
    except CardError as error:
        problem = f"cards on the Hub were not {'all ' if hub.found else ''}looked for: {error}"
    for note in [*hub.notes, problem]:
        if note:
            on_note(note)
    return rank([*found, *hub.found], model, trust=trust, on_note=on_note)


def search(text: str = "", *, limit: int = 50) -> list[ModelInfo]:
    """Return the tuner cards on the Hub: those for the base ``text``, if it is a Hub id, and those with it in a name.

    >>> [info.id for info in search("HuggingFaceTB/SmolLM2-135M")]  # doctest: +SKIP
    ['org/SmolLM2-135M-tuner']
    """
    by_base = _listed([TAG, f"base_model:{text}"], limit=limit) if HubName.of(text) else []
    by_name = _listed([TAG], search=text or None, limit=limit)
    return list({info.id: info for info in [*by_base, *by_name]}.values())[:limit]


def _usable(ranked: Sequence[Candidate]) -> bool:
    return bool(ranked) and ranked[0].usable


def _in_local_store(on_note: OnNote) -> list[Found]:
    try:
        return LocalStore().found(on_note)
    except (ZoftError, OSError) as error:  # what cannot be read or written there stops no run
        on_note(f"the local store was passed over: {error}")
        return []


def _in_shared_store(limit: Deadline | None, on_note: OnNote, on_wait: OnNote) -> list[Found]:
    """The cards of the store that ``ZOFT_STORE`` names; a store that cannot be read in time is skipped with a note."""
    if not os.environ.get("ZOFT_STORE"):
        return []
    on_wait("waiting for the store that ZOFT_STORE names")
    found: list[Found] = []
    notes: list[str] = []

    def read() -> None:
        for store in shared_stores():
            found.extend(store.found(notes.append))

    try:
        _within(limit, "the store that ZOFT_STORE names", read)
    except ZoftError as error:
        notes.append(str(error))
    for note in list(notes):
        on_note(note)
    return list(found)


def _of_store(store: CardStore, limit: Deadline | None, on_note: OnNote) -> list[Found]:
    notes: list[str] = []
    try:
        return _within(limit, f"the store {store.place}", lambda: store.found(notes.append))
    finally:
        for note in list(notes):
            on_note(note)


def _shipped(model: ModelIdentity, on_note: OnNote) -> list[Found]:
    return [one for one in shipped_cards(on_note) if match(one.card, model).kind != "incompatible"]


def _within(limit: Deadline | None, what: str, function: Callable[[], T]) -> T:
    return function() if limit is None else limit.run(what, function)


def _stages(model: ModelIdentity, hub: "_Search") -> Iterator[tuple[str, list[str], ModelIdentity]]:
    """What is searched for, its tags, and the model with the lineage known by then."""
    if model.base_hash is not None:
        yield "for these weights", [f"zoft-base-{model.base_hash[:16]}"], model
    model = replace(model, lineage=hub.bases(model.lineage))
    own = [model.hub_id] if model.hub_id else []
    yield "for the declared bases", [_key(name) for name in [*own, *model.lineage]], model
    yield "for this architecture", [f"zoft-arch-{model.architecture_hash[:16]}"], model


def _key(name: str) -> str:
    """The tag of cards for a base in a lineage: a Hub id, or a base hash."""
    return f"base_model:{name}" if "/" in name else f"zoft-base-{name[:16]}"


@dataclass
class _Search:
    """One search of the Hub within ``limit``; every repository is pulled once. ``found`` holds what was read so far."""

    limit: Deadline | None
    seen: set[str] = field(default_factory=set)
    found: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def look(self, tags: Sequence[str], publishers: Collection[str]) -> None:
        """Read the cards with any of ``tags``, those of ``publishers`` first; others are noted."""
        _within(self.limit, "tuner cards on the Hub", lambda: self._look(tags, publishers))

    def bases(self, names: Collection[str]) -> list[str]:
        """Return ``names``, the bases that these models declare on the Hub, and the bases of those, level by level."""
        return _within(self.limit, "bases on the Hub", lambda: _bases_on_hub(names))

    def _look(self, tags: Sequence[str], publishers: Collection[str]) -> None:
        for tag in tags:
            for repo in _repositories(tag, publishers):
                if repo not in self.seen:
                    self.seen.add(repo)
                    self._pull(repo)

    def _pull(self, repo: str) -> None:
        try:
            card, name = pull(repo)
        except UnreachableError:
            raise
        except CardError as error:  # anyone can publish anything under these tags
            self.notes.append(f"passed over: {error}")
            return
        place = f"{name.repo}@{str(name.revision)[:7]} on the Hub"
        self.found.append(Found(card, str(name), place, publisher=name.repo.split("/")[0]))


def _repositories(tag: str, publishers: Collection[str]) -> list[str]:
    """The repositories with ``tag``, those of ``publishers`` first: many of others cannot hide them."""
    found = _listed([TAG, tag], limit=REPOSITORIES)
    if len(found) >= REPOSITORIES:
        for publisher in sorted(publishers)[:PUBLISHERS]:
            found += _listed([TAG, tag], limit=REPOSITORIES, author=publisher)
    names = dict.fromkeys(info.id for info in found)
    return sorted(names, key=lambda name: name.split("/")[0].casefold() not in publishers)


def _listed(tags: list[str], *, limit: int, **more: str | None) -> list[ModelInfo]:
    """The repositories with all of ``tags``, most downloaded first; one page of them."""
    params = {"filter": tags, "sort": "downloads", "limit": limit, "full": True}
    params |= {name: value for name, value in more.items() if value}
    rows = call("tuner cards on the Hub", lambda: _rows(get_json("/api/models", params)))
    return [info for row in rows[:limit] if (info := _info(row)) is not None]


def _rows(answer: Any) -> list[Any]:
    if not isinstance(answer, list):
        raise ValueError("not a list of repositories")
    return answer


def _info(row: Any) -> ModelInfo | None:
    """The repository that a row of a listing describes; None if it describes none."""
    try:
        info = ModelInfo(**row) if isinstance(row, Mapping) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return info if info is not None and isinstance(info.id, str) and HubName.of(info.id) else None


def _bases_on_hub(names: Collection[str]) -> list[str]:
    found = dict.fromkeys(names)
    level = list(found)
    for _ in range(LEVELS):
        declared = [base for name in level if HubName.of(name) for base in _declared(name)]
        level = [name for name in dict.fromkeys(declared) if name not in found][:MOST_BASES]
        found |= dict.fromkeys(level)
    return list(found)


def _declared(repo: str) -> list[str]:
    try:
        return declared_bases(call(repo, lambda: repository(HubName.parse(repo))))
    except UnreachableError:
        raise
    except CardError:  # a base that was renamed, deleted or made private is still listed by name
        return []
