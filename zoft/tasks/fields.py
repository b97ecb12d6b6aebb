"""Reading the fields of a row; every error names the field, the value found and what was expected."""

from collections.abc import Mapping
from typing import Any

from zoft.errors import DataError


def value(row: Mapping[str, Any], name: str) -> Any:
    """Return ``row[name]``; a missing or null field is a `DataError`."""
    if name not in row:
        raise DataError(f'no field "{name}", found {", ".join(map(str, row)) or "none"}')
    if row[name] is None:
        raise DataError(f'field "{name}" is empty')
    return row[name]


def text(row: Mapping[str, Any], name: str) -> str:
    """Return a field that is text."""
    found = value(row, name)
    if not isinstance(found, str):
        raise DataError(f'field "{name}" is {_shown(found)}, expected text')
    return found


def filled(row: Mapping[str, Any], name: str) -> str:
    """Return a field that is text and not blank."""
    found = text(row, name)
    if not found.strip():
        raise DataError(f'field "{name}" is blank, expected text')
    return found


def texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that is a list of one or more texts."""
    found = value(row, name)
    if not isinstance(found, list | tuple) or not found or not all(isinstance(item, str) for item in found):
        raise DataError(f'field "{name}" is {_shown(found)}, expected a list of texts')
    return tuple(found)


def index(row: Mapping[str, Any], name: str, size: int) -> int:
    """Return a field that is a whole number from 0 to ``size - 1``."""
    found = value(row, name)
    if isinstance(found, bool) or not isinstance(found, int):
        raise DataError(f'field "{name}" is {_shown(found)}, expected a whole number from 0 to {size - 1}')
    if not 0 <= found < size:
        raise DataError(f'field "{name}" is {found}, out of range: expected 0 to {size - 1}')
    return found


def _shown(found: object) -> str:
    shown = repr(found)
    return shown if len(shown) <= 60 else shown[:57] + "..."
