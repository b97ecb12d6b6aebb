"""Choice: the method, tuner, learning rate and eps of a run, given or chosen."""

from dataclasses import dataclass
from typing import Any, Literal

from zoft import registry
from zoft.deploy.config import FinetuneConfig
from zoft.deploy.folder import RunFolder
from zoft.deploy.header import check_base
from zoft.deploy.journal import HeaderLine, TunerUsed
from zoft.errors import ConfigError, RunError
from zoft.events import Listener, Noted, Progress, Warned
from zoft.model import fingerprint
from zoft.model.adapters import Mode, mode_of
from zoft.model.load import Loaded
from zoft.optim import Method, get_method
from zoft.registry import AUTO, Found, ModelIdentity, Recommended, Tuner

Origin = Literal["flag", "card", "method"]


@dataclass(frozen=True)
class Choice:
    """Method, tuner (None if the method uses none), learning rate and eps, and the origin of these two."""

    method: Method
    tuner: Tuner | None
    used: TunerUsed | None
    lr: float
    lr_from: Origin
    eps: float
    eps_from: Origin

    def resolved(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return ``config`` with method and tuner named: ``auto`` by the card found, a Hub id with its commit."""
        named = {"method": self.method.name, "tuner": self.tuner and self.tuner.source}
        return FinetuneConfig.model_validate({**config.model_dump(), **named})


def open_named(config: FinetuneConfig) -> Found | None:
    """Open the card that ``config`` names; None if it names none or ``auto``, `CardError` if there is no such card."""
    return registry.find_card(config.tuner) if config.tuner and config.tuner != AUTO else None


def choose(
    config: FinetuneConfig, loaded: Loaded, named: Found | None = None, *, force: bool, on_event: Listener
) -> Choice:
    """Return the choice for a new run of ``config`` on ``loaded``, and report to ``on_event`` how it was made.

    A named tuner, or method zoft, uses a card, ``auto`` if none is named; ``force`` accepts a stranger. With neither,
    the best card that fits, local or on the Hub, else MeZO. Learning rate and eps: as given, else as the card
    recommends for this number of steps, else the method's published default. ``named`` is the card that ``config``
    names if it was opened before (`open_named`).

    Raises:
        CardError: no such card, or it does not fit.
    """

    def note(message: str) -> None:
        on_event(Noted(message))

    waited = ""

    def wait(what: str) -> None:
        nonlocal waited
        waited = what
        on_event(Progress(what, 0, 1))

    listen: dict[str, Any] = {"trust": config.trust, "on_note": note, "on_wait": wait}
    if config.wanted_method is None:
        tuner = registry.find_tuner(loaded.model, loaded.path, **listen)
        if tuner is None:
            note(
                "neither --tuner nor --method is given, and no card that fits this model may be used: MeZO is "
                "used (make a tuner for it: zoft metatrain MODEL)"
            )
    elif get_method(config.wanted_method).tuned:
        source = named or config.tuner or AUTO
        tuner = registry.load(source, loaded.model, folder=loaded.path, force=force, **listen)
    else:
        tuner = None
    if waited:
        on_event(Progress(waited, 1, 1))
    name = config.wanted_method or ("mezo" if tuner is None else "zoft")
    used = None
    if tuner is not None:
        _report(tuner, on_event)
        base, explanation = tuner.metadata.base.id, tuner.match.explanation
        used = TunerUsed(digest=tuner.digest, source=config.tuner or AUTO, base=base, match=explanation)
    return _choice(config, get_method(name), mode_of(loaded.model), tuner, used)


def choose_again(config: FinetuneConfig, loaded: Loaded, header: HeaderLine, folder: RunFolder) -> Choice:
    """Return the choice of the run that ``header`` began, with the card in its folder.

    Raises:
        RunError: another base, method or card than the run began with, or the card is missing from the folder.
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
    tuner = registry.make_tuner(kept, ModelIdentity.of(loaded.model, loaded.path), force=True)  # accepted at the start
    return _choice(config, get_method(name), mode_of(loaded.model), tuner, header.tuner, header)


def check_objective(method: Method, config: FinetuneConfig) -> None:
    """Raise `ConfigError` if ``method`` needs a gradient and the objective has none."""
    if method.first_order and config.objective != "loss":
        raise ConfigError(
            f"objective {config.objective} has no gradient, which method {method.name} needs; use objective loss, or "
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


def _report(tuner: Tuner, on_event: Listener) -> None:
    place = "" if tuner.place == tuner.source else f" ({tuner.place})"  # a named file is its own place
    message = f"tuner {tuner.digest[:16]}: {tuner.match.explanation}{place}"
    on_event(Noted(message) if tuner.match.fits else Warned(f"accepted by --force: {message}"))
