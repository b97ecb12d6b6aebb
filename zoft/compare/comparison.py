"""An open comparison: its configuration, and what is looked up once about its models and tuner cards."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from zoft import registry
from zoft.compare.config import CompareConfig, MethodSpec
from zoft.model import fingerprint
from zoft.model.adapters.files import WEIGHTS_FILE
from zoft.model.hashes import file_digest
from zoft.model.sources import resolve
from zoft.tasks import get_task
from zoft.tasks.rows import folder_rows, own_rows
from zoft.tasks.types import Split


@dataclass(frozen=True)
class CardFacts:
    """What a comparison uses of a tuner card.

    ``lr`` is the recommended learning rate (None without evidence), ``forwards`` the cost of the meta-training.
    """

    digest: str
    lr: float | None
    forwards: int


@dataclass(frozen=True)
class Comparison:
    """A configuration with the hashes of its models' weights, by name, and the cards of its methods, by label.

    Planning and reports ask for them again and again; a card on the Hub would cost a request each time.
    """

    config: CompareConfig
    weights: Mapping[str, str] = field(default_factory=dict)
    cards: Mapping[str, CardFacts] = field(default_factory=dict)

    @classmethod
    def open(cls, config: CompareConfig) -> "Comparison":
        """Resolve the models and the cards that ``config`` names.

        Raises:
            ZoftError: a task has no rows at the given place, or a model or a card cannot be found.
        """
        _check_data(config)
        weights = {model.name: _weights_of(model.model) for model in config.models}
        return cls(config, weights, {spec.label: _facts_of(spec.card) for spec in config.methods if spec.card})

    def card(self, spec: MethodSpec) -> CardFacts | None:
        """The card that ``spec`` names; None if it names none."""
        return None if spec.card is None else self.cards[spec.label]

    def settings(self) -> dict[str, object]:
        """Return what all work in one folder has to agree on, by name; models and methods may be added later."""
        config = self.config
        found: dict[str, object] = {
            "budget": config.budget,
            "batch_size": config.batch_size,
            "settings": config.model_dump(mode="json")["settings"],
        }
        found |= {f"model {name}": weights for name, weights in self.weights.items()}
        for spec in config.methods:
            method = spec.model_dump(mode="json", include={"method", "settings", "demonstrations"})
            card = self.card(spec)
            found[f"method {spec.label}"] = method if card is None else method | {"tuner": card.digest}
        return found


def _facts_of(source: str) -> CardFacts:
    card = registry.open_card(source)
    return CardFacts(card.digest, card.metadata.recommended.lr, card.metadata.training.forwards)


def _weights_of(model: str) -> str:
    """The base hash of a model; for an adapter also the hash of its own weights."""
    found = resolve(model)
    base = fingerprint.base_hash(found.path)
    return base if found.adapter is None else f"{base} {file_digest(found.adapter / WEIGHTS_FILE)}"


def _check_data(config: CompareConfig) -> None:
    """Read the first row of every local task, so that a wrong path is an error before any model is loaded."""
    if config.data is None:
        return
    sizes: dict[Split, int] = {"train": 1}
    if not config.tasks:
        own_rows(config.data, ("train",), sizes)
    for task in config.tasks:
        folder_rows(get_task(task), config.data, ("train",), sizes)
