"""Rows out of jsonl, csv and parquet files, each with the place it came from."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from zoft.errors import DataError


@dataclass(frozen=True)
class Located:
    """A row and where it is, as a user would look for it: file and line."""

    row: Mapping[str, Any]
    place: str


def read(path: Path) -> Iterator[Located]:
    """Yield the rows of a ``.jsonl``, ``.csv`` or ``.parquet`` file.

    A file that cannot be read or parsed, or has no rows, is a `DataError` that names file and line.
    """
    if path.suffix not in _READERS:
        raise DataError(f"{path}: cannot read files of type {path.suffix or '(none)'}, expected {', '.join(ENDINGS)}")
    empty = True
    try:
        for located in _READERS[path.suffix](path):
            empty = False
            yield located
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if empty:
        raise DataError(f"{path} has no rows")


def _jsonl(path: Path) -> Iterator[Located]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield Located(_json_object(line, place), place)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(found, dict):
        raise DataError(f"{place}: {type(found).__name__} found, expected a JSON object")
    return found


def _csv(path: Path) -> Iterator[Located]:
    reader = csv.DictReader(_lines(path), strict=True)
    start = 2
    try:
        for row in reader:
            place = f"{path}, line {start}"
            if None in row or None in row.values():
                raise DataError(f"{place}: not {len(reader.fieldnames or ())} columns, as the first line has")
            yield Located(row, place)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: not valid csv ({error})") from error


def _parquet(path: Path) -> Iterator[Located]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Located(row, f"{path}, row {number}")
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a valid parquet file: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
ENDINGS = tuple(_READERS)
