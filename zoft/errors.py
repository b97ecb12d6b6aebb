"""Exceptions for errors that a user can fix; the message is the whole explanation."""

import re

_KEYS = (
    r"sig|signature|x-(?:amz|goog|oss|cos)-(?:signature|credential|security-token)|awsaccesskeyid|googleaccessid|"
    r"(?:access|auth|security|session|refresh|sas|hf)[_-]?token|(?:api|access|secret|account|shared)[_-]?key(?:[_-]?id)?|"
    r"aws_[a-z_]{1,32}|(?:client_)?secret|password|passwd|pwd|credential"
)
_SECRETS = (
    (re.compile(r"://[^/\s]*@"), "://***@"),  # user and password: up to the last @ of the host's part
    (re.compile(r"://[^\s/:@]*:(?!\d+(?:[/?#\s]|$))\S*@"), "://***@"),  # a password with a slash; no port
    (re.compile(r"(://[^\s?#'\"<>]*)[?#][^\s'\"<>]*"), r"\1?***"),  # the signature or token of an address
    (re.compile(rf"(?i)(?<![\w-])({_KEYS})(=|%3D)[^\s&'\"<>]+"), r"\1\2***"),
    (re.compile(r"(?i)([?&](?:token|key|auth|code)=)[^\s&'\"<>]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic) [A-Za-z0-9._~+/=-]{16,}"), r"\1 ***"),
    (re.compile(r"hf_[A-Za-z0-9]{8,}"), "hf_***"),
)


def redacted(text: str) -> str:
    """Return ``text`` without the secrets that addresses carry: passwords, query strings, signatures and tokens.

    >>> redacted("s3://me:p@ss@host/tuners and https://store/x?sv=1&sig=abc")
    's3://***@host/tuners and https://store/x?***'
    """
    for pattern, put in _SECRETS:
        text = pattern.sub(put, text)
    return text


class ZoftError(Exception):
    """Base class of errors that a user can fix: names what was found, what was expected and what to try.

    The command line prints the message without a traceback and exits with 1. Messages are `redacted`.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redacted(one) if isinstance(one, str) else one for one in arguments))


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


def printable(text: str) -> str:
    """Return ``text`` with ``?`` for every character that could act on a terminal.

    >>> printable("a\\x1b[2J")
    'a?[2J'
    """
    return "".join(one if one.isprintable() else "?" for one in text)
