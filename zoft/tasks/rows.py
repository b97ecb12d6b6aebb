"""Rows of data: read from jsonl, csv and parquet files, divided into splits, and checked field by field.

Every error names what a user would look for: file, line and field, the value found and what was expected.
"""

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from zoft.errors import DataError, shown
from zoft.tasks.types import Split, Task

Sizes = Mapping[Split, int]

csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))  # a document is longer than the 131,072 of the standard


@dataclass(frozen=True)
class Located:
    """A row and its place, such as file and line."""

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
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes the libraries that read it raise whatever they like
        raise DataError(f"cannot read {path}: {shown(str(error) or type(error).__name__, 200)}") from error
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
        found = json.loads(line, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # names twice, numbers of thousands of digits, lists too deep
        raise DataError(f"{place}: not valid JSON ({shown(str(error), 200)})") from error
    if not isinstance(found, dict):
        raise DataError(f"{place}: {type(found).__name__} found, expected a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; `ValueError` if it has a name twice, of which Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'"{next(name for name in names if names.count(name) > 1)}" twice')
    return found


def _csv(path: Path) -> Iterator[Located]:
    reader = csv.DictReader(_lines(path), strict=True)
    start = 2
    try:
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise DataError(f"{path}, line 1: two columns have the same name, found {', '.join(names)}")
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
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = shown(str(error) or type(error).__name__, 200)
        raise DataError(f"{path} is not a valid parquet file: {reason}") from error


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
ENDINGS = tuple(_READERS)


def folder_rows(task: Task, data: Path, splits: Sequence[Split], sizes: Sizes) -> dict[Split, list[Located]]:
    """Return the first ``sizes[split]`` rows of ``data/<task>/<split>.jsonl``, in file order.

    The first of ``splits`` is required; another that has no file is empty.
    """
    folder = data / task.name
    if not folder.is_dir():
        if not data.exists():
            raise DataError(f"no such folder: {data}; expected {task.name}/{splits[0]}.jsonl in it")
        found = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
        raise DataError(f"no folder {folder}, expected {splits[0]}.jsonl in it; {data} has {_list(found)}")
    rows: dict[Split, list[Located]] = {}
    for split in splits:
        path = folder / f"{split}.jsonl"
        if path.exists() or split == splits[0]:
            rows[split] = list(itertools.islice(read(path), sizes[split]))
    return rows


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "no folders"


def own_rows(data: Path, splits: Sequence[Split], sizes: Sizes) -> dict[Split, list[Located]]:
    """Return up to ``sizes[split]`` rows of each split that ``data`` has; the first of ``splits`` is required.

    A folder holds one file per split. A single file is split 80 / 10 / 10 by a hash of each row's content, so that a
    row keeps its split when others are added or removed, and equal rows share a split.
    """
    if data.is_dir():
        rows = {split: read(path) for split in splits if (path := _split_file(data, split, split == splits[0]))}
    elif data.exists():
        parts = _by_hash(read(data))
        rows = {split: iter(parts[split]) for split in splits if parts[split]}
        if splits[0] not in rows:
            raise DataError(f"{data} has too few rows: the {splits[0]} split gets none; give a folder of split files")
    else:
        raise DataError(f"no such file or folder: {data}")
    return {split: list(itertools.islice(found, sizes[split])) for split, found in rows.items()}


def _split_file(folder: Path, split: str, required: bool) -> Path | None:
    found = [path for ending in ENDINGS if (path := folder / f"{split}{ending}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} has {found[0].name} and {found[1].name}; keep one of them")
    if not found and required:
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"{folder} has no {split} file ({', '.join(split + e for e in ENDINGS)}); found {present}")
    return found[0] if found else None


def _by_hash(rows: Iterable[Located]) -> dict[Split, list[Located]]:
    parts: dict[Split, list[Located]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        parts[split_of(row.row)].append(row)
    return parts


def split_of(row: Mapping[str, Any]) -> Split:
    """Return the split of a row by a hash of its content: 8 of 10 rows are train, 1 dev, 1 test."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    bucket = int.from_bytes(hashlib.sha256(content.encode(errors="surrogatepass")).digest()[:8], "big") % 10
    return "train" if bucket < 8 else "dev" if bucket == 8 else "test"


def field(row: Mapping[str, Any], name: str) -> Any:
    """Return ``row[name]``; a missing or null field is a `DataError`."""
    if name not in row:
        raise DataError(f'no field "{name}", found {", ".join(map(str, row)) or "none"}')
    if row[name] is None:
        raise DataError(f'field "{name}" is empty')
    return row[name]


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Return a field that is text."""
    found = field(row, name)
    if not isinstance(found, str):
        raise DataError(f'field "{name}" is {_quoted(found)}, expected text')
    return whole_text(found, name)


def filled_field(row: Mapping[str, Any], name: str) -> str:
    """Return a field that is text and not blank."""
    found = text_field(row, name)
    if not found.strip():
        raise DataError(f'field "{name}" is blank, expected text')
    return found


def texts_field(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that is a list of one or more texts."""
    found = field(row, name)
    if not isinstance(found, list | tuple) or not found or not all(isinstance(item, str) for item in found):
        raise DataError(f'field "{name}" is {_quoted(found)}, expected a list of texts')
    return tuple(whole_text(item, name) for item in found)


def whole_text(text: str, name: str) -> str:
    """Return ``text``, the content of field ``name``; `DataError` if it holds half a character, as of a cut emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f'field "{name}" holds half a character ({ascii(text[error.start])[1:-1]}, a lone surrogate) at place '
            f"{error.start + 1} of its text: it was cut in the middle of one, or written with another encoding"
        ) from error
    return text


def index_field(row: Mapping[str, Any], name: str, size: int) -> int:
    """Return a field that is a whole number from 0 to ``size - 1``; 1.0, as pandas writes it, is 1."""
    found = field(row, name)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, bool) or not isinstance(found, int):
        raise DataError(f'field "{name}" is {_quoted(found)}, expected a whole number from 0 to {size - 1}')
    if not 0 <= found < size:
        raise DataError(f'field "{name}" is {found}, out of range: expected 0 to {size - 1}')
    return found


def _quoted(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 60 else text[:57] + "..."
