"""Find the cards for a model: local ones first, then the Hub by base hash, declared lineage and architecture."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import huggingface_hub
from huggingface_hub import ModelInfo, constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from zoft.errors import CardError
from zoft.registry.hub.client import TIMEOUT, HubName, UnreachableError, call
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
from zoft.registry.stores.store import CardStore, Found

REPOSITORIES = 12  # read for one tag at most: anyone may publish under any tag
PLACES = "the local store, the cards shipped with zoft and on the Hub"

OnNote = Callable[[str], None]


def ignore(note: str) -> None:
    """Drop the note: the default listener."""


def discover(
    model: ModelIdentity, store: CardStore | None = None, *, everything: bool = False, on_note: OnNote = ignore
) -> list[Candidate]:
    """Return the cards for ``model``, best first: those of ``store``, by default local ones and the Hub's.

    Searched in this order: the local store, the one that ``ZOFT_STORE`` names and the cards shipped with zoft; then, on
    the Hub, cards with the tag of the base hash, with a base in the model's ``base_model`` chain, with the tag of the
    architecture hash. The search ends at the first of these with a card that fits, unless ``everything`` is wanted.
    ``on_note`` receives a sentence if the Hub or a shared store cannot be reached, which ends the search there.

    >>> discover(ModelIdentity.of(loaded.model, loaded.path))[0].match.explanation  # doctest: +SKIP
    'same base: the card was made for these weights (org/base, 5c1f0a77d2e94b31)'
    """
    if store is not None:
        return rank(store.found(), model)
    shipped = [one for one in shipped_cards() if match(one.card, model).kind != "incompatible"]
    found = [*LocalStore().found(), *_in_shared_store(on_note), *shipped]
    ranked = rank(found, model)
    if (_fits(ranked) and not everything) or constants.is_offline_mode():
        return ranked
    try:
        for stage, identity in _stages(model):
            found += stage
            ranked = rank(found, identity)
            if _fits(ranked) and not everything:
                break
    except CardError as error:
        on_note(f"cards on the Hub were not looked for: {error}")
    return ranked


def search(text: str = "", *, limit: int = 50) -> list[ModelInfo]:
    """Return the tuner cards on the Hub: those for the base ``text``, if it is a Hub id, and those with it in a name.

    >>> [info.id for info in search("HuggingFaceTB/SmolLM2-135M")]  # doctest: +SKIP
    ['org/SmolLM2-135M-tuner']
    """
    by_base = _listed([TAG, f"base_model:{text}"], limit=limit) if HubName.of(text) else []
    by_name = _listed([TAG], search=text or None, limit=limit)
    return list({info.id: info for info in [*by_base, *by_name]}.values())[:limit]


def _fits(ranked: Sequence[Candidate]) -> bool:
    return bool(ranked) and ranked[0].match.fits


def _in_shared_store(on_note: OnNote) -> list[Found]:
    """The cards of the store that ``ZOFT_STORE`` names; a store that cannot be read is skipped with a note."""
    try:
        return [one for store in shared_stores() for one in store.found()]
    except CardError as error:
        on_note(str(error))
        return []


def _stages(model: ModelIdentity) -> Iterator[tuple[list[Found], ModelIdentity]]:
    """The cards found by each kind of key, and the model with the lineage known by then."""
    hub = _Search()
    if model.base_hash is not None:
        yield hub.cards(f"zoft-base-{model.base_hash[:16]}"), model
    model = replace(model, lineage=_bases_on_hub(model.lineage))
    own = [model.hub_id] if model.hub_id else []
    yield hub.cards(*(_key(name) for name in [*own, *model.lineage])), model
    yield hub.cards(f"zoft-arch-{model.architecture_hash[:16]}"), model


def _key(name: str) -> str:
    """The tag of cards for a base in a lineage: a Hub id, or a base hash."""
    return f"base_model:{name}" if "/" in name else f"zoft-base-{name[:16]}"


@dataclass
class _Search:
    """One search of the Hub; every repository is pulled once."""

    seen: set[str] = field(default_factory=set)

    def cards(self, *tags: str) -> list[Found]:
        """Return the readable cards with any of ``tags``; repositories without a whole card are skipped."""
        found = []
        for tag in tags:
            for info in _listed([TAG, tag], limit=REPOSITORIES):
                if info.id not in self.seen:
                    self.seen.add(info.id)
                    found += _pulled(info.id)
        return found


def _pulled(repo: str) -> list[Found]:
    try:
        card, name = pull(repo)
    except UnreachableError:
        raise
    except CardError:  # anyone can publish anything under these tags; `zoft registry pull` reports the error
        return []
    return [Found(card, str(name), f"{name.repo}@{str(name.revision)[:7]} on the Hub")]


def _listed(tags: list[str], *, limit: int, search: str | None = None) -> list[ModelInfo]:
    """The repositories with all of ``tags``, most downloaded first; one page of them.

    Not `HfApi.list_models`, which retries a Hub that is down for half a minute; here `call` decides about retries.
    """
    params: Any = {"filter": tags, "sort": "downloads", "limit": limit, "full": True}
    params |= {"search": search} if search else {}

    def get() -> list[ModelInfo]:
        url, headers = f"{constants.ENDPOINT}/api/models", build_hf_headers()
        answer = get_session().get(url, params=params, headers=headers, timeout=TIMEOUT)
        hf_raise_for_status(answer)
        return [ModelInfo(**row) for row in answer.json()][:limit]

    return call("tuner cards on the Hub", get)


def _bases_on_hub(names: Collection[str]) -> list[str]:
    """``names``, the bases that these models declare on the Hub, and the bases of those, level by level."""
    api, found = huggingface_hub.HfApi(), dict.fromkeys(names)
    level = list(found)
    for _ in range(LEVELS):
        declared = [base for name in level if HubName.of(name) for base in _declared(api, name)]
        level = [name for name in dict.fromkeys(declared) if name not in found]
        found |= dict.fromkeys(level)
    return list(found)


def _declared(api: huggingface_hub.HfApi, repo: str) -> list[str]:
    try:
        info = call(repo, lambda: api.model_info(repo, timeout=TIMEOUT))
    except UnreachableError:
        raise
    except CardError:  # a base that was renamed, deleted or made private is still listed by name
        return []
    return declared_bases(info)
