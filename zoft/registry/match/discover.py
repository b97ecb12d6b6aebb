"""Finding the card for a model: what is here first, then the Hub by hash, by declared lineage, by architecture."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import huggingface_hub
from huggingface_hub import ModelInfo, constants
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from zoft.errors import CardError
from zoft.registry.card.page import TAG
from zoft.registry.hub.client import TIMEOUT, HubName, UnreachableError, call
from zoft.registry.hub.published import declared_bases
from zoft.registry.hub.pull import pull
from zoft.registry.match.candidates import Candidate, Found, Subject, in_store, rank
from zoft.registry.match.lineage import LEVELS
from zoft.registry.stores.local import Store
from zoft.registry.stores.remote import shared_stores
from zoft.registry.stores.shipped import shipped

REPOSITORIES = 12  # looked at for one key: anybody may publish with any tag
PLACES = "the local store, the cards shipped with zoft and on the Hub"

Tell = Callable[[str], None]


def discover(subject: Subject, *, everything: bool = False, tell: Tell = lambda message: None) -> list[Candidate]:
    """Return the cards for ``subject``, best first.

    Looked at in this order: the local store, the one that ``ZOFT_STORE`` names and the cards that come with zoft;
    then, on the Hub, cards with the tag of the base hash, with a base that the model's ``base_model`` chain names, with
    the tag of the architecture hash. The search ends with the first of these that has a card that fits, unless
    ``everything`` is wanted. A Hub that cannot be reached costs one note to ``tell``, not the search.
    """
    with_zoft = [one for one in shipped() if subject.match(one.card).kind != "incompatible"]
    found = [*in_store(Store()), *_in_shared_store(tell), *with_zoft]
    ranked = rank(found, subject)
    if (_fits(ranked) and not everything) or constants.is_offline_mode():
        return ranked
    try:
        for stage, named in _stages(subject):
            found += stage
            ranked = rank(found, named)
            if _fits(ranked) and not everything:
                break
    except CardError as error:
        tell(f"cards on the Hub were not looked for: {error}")
    return ranked


def search(text: str = "", *, limit: int = 50) -> list[ModelInfo]:
    """Return the tuner cards on the Hub: those for the base ``text``, if it is a Hub id, and those named like it.

    >>> [info.id for info in search("HuggingFaceTB/SmolLM2-135M")]  # doctest: +SKIP
    ['org/SmolLM2-135M-tuner']
    """
    by_base = _listed([TAG, f"base_model:{text}"], limit=limit) if HubName.of(text) else []
    by_name = _listed([TAG], search=text or None, limit=limit)
    return list({info.id: info for info in [*by_base, *by_name]}.values())[:limit]


def _fits(ranked: Sequence[Candidate]) -> bool:
    return bool(ranked) and ranked[0].match.fits


def _in_shared_store(tell: Tell) -> list[Found]:
    """The cards of the store that ``ZOFT_STORE`` names; one that cannot be read is told of and passed over."""
    try:
        return [one for store in shared_stores() for one in in_store(store)]
    except CardError as error:
        tell(str(error))
        return []


def _stages(subject: Subject) -> Iterator[tuple[list[Found], Subject]]:
    """The cards that each kind of key finds, and the subject with the lineage that was known then."""
    hub = _Search()
    if subject.base_hash is not None:
        yield hub.cards(f"zoft-base-{subject.base_hash[:16]}"), subject
    subject = replace(subject, lineage=_bases_on_hub(subject.lineage))
    own = [subject.id] if subject.id else []
    yield hub.cards(*(_key(name) for name in [*own, *subject.lineage])), subject
    yield hub.cards(f"zoft-arch-{subject.architecture_hash[:16]}"), subject


def _key(name: str) -> str:
    """The tag of cards for a base in a lineage: a Hub id, or a base hash."""
    return f"base_model:{name}" if "/" in name else f"zoft-base-{name[:16]}"


@dataclass
class _Search:
    """One search of the Hub; every repository is pulled once."""

    seen: set[str] = field(default_factory=set)

    def cards(self, *tags: str) -> list[Found]:
        """Return the readable cards with any of ``tags``; what is no card, or a damaged one, is passed over."""
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
    except CardError:  # anybody can publish anything under these tags: `zoft registry pull` says what is wrong with it
        return []
    return [Found(card, str(name), f"{name.repo}@{str(name.revision)[:7]} on the Hub")]


def _listed(tags: list[str], *, limit: int, search: str | None = None) -> list[ModelInfo]:
    """The repositories with all of ``tags``, most downloaded first; one page of them.

    `HfApi.list_models` would try a Hub that is down again for half a minute, which `call` decides here.
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
    """``names``, and what the models called so declare as their bases on the Hub, and theirs, level by level."""
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
    except CardError:  # a base that was renamed, deleted or made private still counts by its name
        return []
    return declared_bases(info)
