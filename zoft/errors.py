"""What can go wrong for a user, as exceptions whose message is the whole explanation."""


class ZoftError(Exception):
    """Base of every error that a user can mend: names what was found, what was expected and what to try.

    The command line prints the message without a traceback and exits with 1.
    """


class ConfigError(ZoftError):
    """A setting, or a combination of settings, that cannot work."""


class ModelError(ZoftError):
    """A model that cannot be found, read or trained."""


class DataError(ZoftError):
    """A task or a row of data that cannot be used; names file, line and field where there are any."""


class CardError(ZoftError):
    """A tuner card that cannot be read, written, found or used with a model."""


class RunError(ZoftError):
    """A run folder, journal or snapshot that cannot be used, or a run that cannot go on."""


class DivergedError(RunError):
    """A run whose losses or weights are no longer finite; a lower learning rate mends it."""


class Interrupted(ZoftError):
    """A run that was asked to stop and did, with everything saved; the command line exits with 130."""


def shown(value: object, limit: int = 80) -> str:
    """Return ``value`` as a message may show it: short, and without what could act on a terminal.

    >>> shown("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    text = ascii(value) if not isinstance(value, str) else ascii(value)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
