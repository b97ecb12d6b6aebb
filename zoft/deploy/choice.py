"""What drives a run: method, tuner, learning rate and eps, given or chosen."""

from dataclasses import dataclass
from typing import Literal

from zoft import registry
from zoft.deploy.config import FinetuneConfig
from zoft.deploy.folder import RunFolder
from zoft.deploy.header import check_base
from zoft.deploy.journal import HeaderLine, TunerUsed
from zoft.errors import ConfigError, RunError
from zoft.events import Listener, Noted, Warned
from zoft.model import fingerprint
from zoft.model.adapters import Mode, mode_of
from zoft.model.load import Loaded
from zoft.optim import Method, get_method
from zoft.registry import Found, Subject, Tuner
from zoft.registry.card.schema import Recommended

Origin = Literal["flag", "card", "method"]
AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """Method, tuner (None where the method takes none), and learning rate and eps with where they came from."""

    method: Method
    tuner: Tuner | None
    used: TunerUsed | None
    lr: float
    lr_from: Origin
    eps: float
    eps_from: Origin

    def resolved(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return ``config`` with method and tuner named: ``auto`` by what it found, a Hub id with its commit."""
        named = {"method": self.method.name, "tuner": self.tuner and self.tuner.source}
        return FinetuneConfig.model_validate({**config.model_dump(), **named})


def choose(config: FinetuneConfig, loaded: Loaded, *, force: bool, on_event: Listener) -> Choice:
    """Return what drives a new run of ``config`` on ``loaded``, and tell ``on_event`` how it was chosen.

    A named tuner, or method zoft, takes a card, ``auto`` if none is named; ``force`` lets a stranger pass. With
    neither, the best card that fits, here or on the Hub, else MeZO. Learning rate and eps: given, else what the card
    recommends for so many steps, else the method's published default.

    Raises:
        CardError: no such card, or it does not fit.
    """
    if config.wanted_method is None:
        tuner = registry.find(loaded.model, loaded.path, tell=lambda message: on_event(Noted(message)))
        if tuner is None:
            on_event(
                Noted(
                    "neither --tuner nor --method, and no card here or on the Hub fits this model: MeZO is used "
                    "(a tuner for it: zoft metatrain MODEL)"
                )
            )
    elif get_method(config.wanted_method).tuned:
        tuner = registry.load(
            config.tuner or AUTO,
            loaded.model,
            folder=loaded.path,
            force=force,
            tell=lambda message: on_event(Noted(message)),
        )
    else:
        tuner = None
    name = config.wanted_method or ("mezo" if tuner is None else "zoft")
    used = None
    if tuner is not None:
        _tell(tuner, on_event)
        base, explanation = tuner.metadata.base.id, tuner.match.explanation
        used = TunerUsed(digest=tuner.digest, source=config.tuner or AUTO, base=base, match=explanation)
    return _choice(config, get_method(name), mode_of(loaded.model), tuner, used)


def choose_again(config: FinetuneConfig, loaded: Loaded, header: HeaderLine, folder: RunFolder) -> Choice:
    """Return what drove the run that ``header`` began, from the card in its folder.

    Raises:
        RunError: another base, method or card than the run began with, or the card is gone from the folder.
    """
    check_base(header, config.model, fingerprint.base_hash(loaded.path))
    name = header.method
    if config.wanted_method not in (None, name):
        raise RunError(f"{folder.path} holds a run of method {name}; resume without --method and --tuner")
    if header.tuner is None:
        return _choice(config, get_method(name), mode_of(loaded.model), None, None, header)
    card = folder.read_tuner(header.tuner.digest)
    if config.tuner not in (None, AUTO, header.tuner.source, header.config.get("tuner")):
        named = registry.open_card(config.tuner).digest
        if named != card.digest:
            raise RunError(
                f"{folder.path} holds a run with the card {card.digest[:16]}, {config.tuner} is {named[:16]}; resume "
                "without --tuner, or choose another --out"
            )
    kept = Found(card, str(header.config.get("tuner")), "in the run folder")
    tuner = registry.fit(kept, Subject.of(loaded.model, loaded.path), force=True)  # let pass when the run began
    return _choice(config, get_method(name), mode_of(loaded.model), tuner, header.tuner, header)


def check_objective(method: Method, config: FinetuneConfig) -> None:
    """Raise `ConfigError` where ``method`` needs a gradient and the objective has none."""
    if method.first_order and config.objective != "loss":
        raise ConfigError(
            f"objective {config.objective} has no gradient, which method {method.name} needs; take objective loss, or "
            "a zeroth-order method"
        )


def _choice(
    config: FinetuneConfig,
    method: Method,
    mode: Mode,
    tuner: Tuner | None,
    used: TunerUsed | None,
    header: HeaderLine | None = None,
) -> Choice:
    recommended = tuner.metadata.recommended if tuner is not None else Recommended()
    advised = tuner.metadata.lr_for(config.steps) if tuner is not None else None
    published = method.settings(mode)
    lr, lr_from = _first(config.lr, advised, published.lr)
    eps, eps_from = _first(config.eps, recommended.eps, published.eps)
    if header is not None:
        lr, eps = header.lr, header.eps
    return Choice(method, tuner, used, lr, lr_from, eps, eps_from)


def _first(flag: float | None, card: float | None, method: float) -> tuple[float, Origin]:
    if flag is not None:
        return flag, "flag"
    return (method, "method") if card is None else (card, "card")


def _tell(tuner: Tuner, on_event: Listener) -> None:
    place = "" if tuner.place == tuner.source else f" ({tuner.place})"  # a file that was named needs no telling
    message = f"tuner {tuner.digest[:16]}: {tuner.match.explanation}{place}"
    on_event(Noted(message) if tuner.match.fits else Warned(f"taken by force: {message}"))
