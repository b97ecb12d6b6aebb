"""Tasks of a user's own rows, described by the columns of the first row.

``messages``; ``prompt``, ``choices`` and ``label``; ``prompt`` and ``completion``; or ``text``. In csv, ``choices`` and
``messages`` are JSON. Conversations are rendered by the tokenizer's chat template, and trained on every turn of the
assistant.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zoft.errors import DataError, shown
from zoft.tasks.chat import ChatTemplate
from zoft.tasks.rows import Located, field, filled_field, index_field, texts_field
from zoft.tasks.text_metrics import exact_match, token_f1
from zoft.tasks.types import Example, Task

FORMS = (("messages",), ("prompt", "choices", "label"), ("prompt", "completion"), ("text",))
_COLUMNS = {"labels", *(column for form in FORMS for column in form)}


def own_task(data: Path, rows: Sequence[Located], template: ChatTemplate, end: str = "") -> Task:
    """Return the task that the first of ``rows`` (not empty) describes by its columns.

    ``end`` is the text of the end token, which is not part of an answer.
    """
    form = _form(rows[0])
    name = data.stem
    source = data.name
    if form == ("messages",):
        return _text_task(name, source, "messages", lambda row: template.example(_decoded(row, "messages")))
    if form == ("text",):
        return _text_task(name, source, "text", _text)
    if form == ("prompt", "choices", "label"):
        return Task(name, "classification", "accuracy", source, "{prompt}{choice}", _choices, target="choices")
    return _completion_task(name, source, rows, end)


def _form(first: Located) -> tuple[str, ...]:
    for form in FORMS:
        if set(form) <= set(first.row):
            if form == ("text",) and (more := _COLUMNS & set(first.row) - {"text"}):
                raise DataError(
                    f"{first.place}: fields text and {', '.join(sorted(more))}: a text is trained on its own tokens, "
                    "not on a label; give prompt, choices and label to classify, or leave out all but text"
                )
            return form
    expected = "; ".join(" + ".join(form) for form in FORMS)
    raise DataError(f"{first.place}: fields {', '.join(map(str, first.row)) or 'none'}, expected one of: {expected}")


def ignored(first: Located) -> tuple[str, ...]:
    """Return the columns of the first row that other kinds of rows have, and that are not read here."""
    return tuple(sorted(_COLUMNS & set(first.row) - set(_form(first))))


def _text_task(name: str, source: str, column: str, example: Any) -> Task:
    return Task(name, "text", "perplexity", source, f"{{{column}}}", example, target=column)


def _completion_task(name: str, source: str, rows: Sequence[Located], end: str) -> Task:
    completions = [str(row.row.get("completion")) for row in rows]
    many_lines = any("\n" in completion.strip() for completion in completions)
    return Task(
        name,
        kind="generation",
        metric="f1",
        source=source,
        prompt="{prompt}{completion}",
        example=partial(_completion, end),
        target="completion",
        scores={"f1": token_f1, "em": exact_match},
        stop=None if many_lines else "\n",
        max_new_tokens=256 if many_lines else 50,
        append_eos=True,
    )


def _completion(end: str, row: Mapping[str, Any]) -> Example:
    completion = filled_field(row, "completion")
    answer = completion.strip()
    while end and answer.endswith(end):
        answer = answer.removesuffix(end).rstrip()
        completion = completion.rstrip()  # so that the end token is found at its end
    return Example(filled_field(row, "prompt"), (completion,), answers=(answer,))


def _text(row: Mapping[str, Any]) -> Example:
    return Example("", (filled_field(row, "text"),))


def _choices(row: Mapping[str, Any]) -> Example:
    row = {**row, "choices": _decoded(row, "choices"), "label": _number(row.get("label"))}
    choices = texts_field(row, "choices")
    if len(choices) < 2 or "" in choices:
        raise DataError(f'field "choices" is {list(choices)}, expected two or more texts of length 1 or more')
    if len(set(choices)) < len(choices):
        raise DataError(f'field "choices" has the same text twice: {list(choices)}')
    return Example(filled_field(row, "prompt"), choices, index_field(row, "label", len(choices)))


def _decoded(row: Mapping[str, Any], name: str) -> Any:
    """A list field, which csv holds as JSON."""
    found = field(row, name)
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else shown(str(error))
        raise DataError(f'field "{name}" is not a list, nor JSON of one ({reason})') from error


def _number(label: Any) -> Any:
    """A label that csv holds as text: "1", or "1.0" as pandas writes it beside missing ones."""
    found = re.fullmatch(r"\s*([+-]?[0-9]{1,18})(\.0*)?\s*", label) if isinstance(label, str) else None
    return int(found[1]) if found else label
