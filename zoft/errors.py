"""Exceptions for errors that a user can fix; the message is the whole explanation."""


class ZoftError(Exception):
    """Base class of errors that a user can fix: names what was found, what was expected and what to try.

    The command line prints the message without a traceback and exits with 1.
    """


class ConfigError(ZoftError):
    """An invalid setting or combination of settings."""


class ModelError(ZoftError):
    """A model that cannot be found, read or trained."""


class DataError(ZoftError):
    """A task or a row of data that cannot be used; names file, line and field where there are any."""


class CardError(ZoftError):
    """A tuner card that cannot be read, written, found or used with a model."""


class RunError(ZoftError):
    """A run folder, journal or snapshot that cannot be used, or a run that cannot continue."""


class DivergedError(RunError):
    """A run whose losses or weights are no longer finite; try a lower learning rate."""


class Interrupted(ZoftError):
    """A run that was cancelled, with everything saved; the command line exits with 130."""


def shown(value: object, limit: int = 80) -> str:
    """Return ``value`` for use in a message: shortened, and with control characters escaped.

    >>> shown("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    text = ascii(value) if not isinstance(value, str) else ascii(value)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
