"""A user's own data: a jsonl, csv or parquet file, or a folder of train, dev and test files.

The columns of the first row say what a row is: ``messages``; ``prompt``, ``choices`` and ``label``; ``prompt`` and
``completion``; or ``text``. In csv, ``choices`` and ``messages`` are JSON.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from zoft.errors import DataError
from zoft.tasks import fields
from zoft.tasks.chat import conversation
from zoft.tasks.data import Sizes
from zoft.tasks.files import ENDINGS, Located, read
from zoft.tasks.metrics import exact_match, token_f1
from zoft.tasks.types import Example, Split, Task

FORMS = (("messages",), ("prompt", "choices", "label"), ("prompt", "completion"), ("text",))


def own_rows(data: Path, splits: Sequence[Split], sizes: Sizes) -> dict[Split, list[Located]]:
    """Return up to ``sizes[split]`` rows of each split that ``data`` has; the first of ``splits`` is required.

    A folder holds one file a split. One file is split 80 / 10 / 10 by a hash of each row's content, so that a row
    keeps its split when others come or go, and equal rows share one.
    """
    if data.is_dir():
        rows = {split: read(path) for split in splits if (path := _split_file(data, split, split == splits[0]))}
    elif data.exists():
        parts = _by_hash(read(data))
        rows = {split: iter(parts[split]) for split in splits if parts[split]}
        if splits[0] not in rows:
            raise DataError(
                f"{data} has too few rows: none falls to the {splits[0]} split; give a folder of split files"
            )
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
    """Return the split of a row by its content: 8 of 10 rows are train, 1 dev, 1 test."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    bucket = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 8 else "dev" if bucket == 8 else "test"


def own_task(data: Path, rows: Sequence[Located], tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return the task that the first of ``rows`` (not empty) describes by its columns."""
    form = _form(rows[0])
    name = data.stem
    source = data.name
    if form == ("messages",):
        return _text_task(name, source, "messages", lambda row: conversation(_decoded(row, "messages"), tokenizer))
    if form == ("text",):
        return _text_task(name, source, "text", _text)
    if form == ("prompt", "choices", "label"):
        return Task(name, "classification", "accuracy", source, "{prompt}{choice}", _choices, target="choices")
    return _completion_task(name, source, rows)


def _form(first: Located) -> tuple[str, ...]:
    for form in FORMS:
        if set(form) <= set(first.row):
            return form
    expected = "; ".join(" + ".join(form) for form in FORMS)
    raise DataError(f"{first.place}: fields {', '.join(map(str, first.row)) or 'none'}, expected one of: {expected}")


def _text_task(name: str, source: str, field: str, example: Any) -> Task:
    return Task(name, "text", "perplexity", source, f"{{{field}}}", example, target=field)


def _completion_task(name: str, source: str, rows: Sequence[Located]) -> Task:
    completions = [str(row.row.get("completion")) for row in rows]
    many_lines = any("\n" in completion.strip() for completion in completions)
    return Task(
        name,
        kind="generation",
        metric="f1",
        source=source,
        prompt="{prompt}{completion}",
        example=_completion,
        target="completion",
        scores={"f1": token_f1, "em": exact_match},
        stop=None if many_lines else "\n",
        max_new_tokens=256 if many_lines else 50,
        append_eos=True,
    )


def _completion(row: Mapping[str, Any]) -> Example:
    completion = fields.filled(row, "completion")
    return Example(fields.filled(row, "prompt"), (completion,), answers=(completion.strip(),))


def _text(row: Mapping[str, Any]) -> Example:
    return Example("", (fields.filled(row, "text"),))


def _choices(row: Mapping[str, Any]) -> Example:
    row = {**row, "choices": _decoded(row, "choices"), "label": _number(row.get("label"))}
    choices = fields.texts(row, "choices")
    if len(choices) < 2 or "" in choices:
        raise DataError(f'field "choices" is {list(choices)}, expected two or more texts of length 1 or more')
    if len(set(choices)) < len(choices):
        raise DataError(f'field "choices" has the same text twice: {list(choices)}')
    return Example(fields.filled(row, "prompt"), choices, fields.index(row, "label", len(choices)))


def _decoded(row: Mapping[str, Any], name: str) -> Any:
    """A list field; in csv it is written as JSON."""
    found = fields.value(row, name)
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except json.JSONDecodeError as error:
        raise DataError(f'field "{name}" is not a list, nor JSON of one ({error.msg})') from error


def _number(label: Any) -> Any:
    return int(label) if isinstance(label, str) and label.strip().lstrip("-").isdecimal() else label
