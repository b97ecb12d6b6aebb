"""Cloze prompts for masked language models, and their encoding (LM-BFF, arXiv 2012.15723; used by MeZO and DiZO).

The choice, with its leading space, fills a gap inside the text. There the model reads one mask token per token of the
choice, and is scored on its predictions at them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from zoft.errors import ConfigError, DataError, ModelError
from zoft.tasks.encode import Tokens, check_fast, special_tokens, tokenised
from zoft.tasks.rows import index_field, text_field
from zoft.tasks.types import Encoded, Example, Row, Target, Task

GAP = "[MASK]"
_NLI = "{premise}? [MASK], {hypothesis}"
_ENTAILED = (" Yes", " Maybe", " No")
_SENTIMENT = ("{sentence} It was [MASK].", (" terrible", " great"))
CLOZES: dict[str, tuple[str, tuple[str, ...]]] = {
    "sst2": _SENTIMENT,
    "sst5": ("{text} It was [MASK].", (" terrible", " bad", " okay", " good", " great")),
    "snli": (_NLI, _ENTAILED),
    "mnli": (_NLI, _ENTAILED),
    "rte": (_NLI, (" Yes", " No")),
    "trec": (
        "[MASK]: {text}",
        (" Expression", " Entity", " Description", " Human", " Location", " Number"),
    ),
    "vader_movie": _SENTIMENT,
    "vader_tweets": _SENTIMENT,
    "vader_amazon": _SENTIMENT,
}


def cloze_task(task: Task) -> Task:
    """Return a built-in ``task`` with its cloze prompt and label words.

    Raises:
        ConfigError: it has none: its answers are not single words, or none is published.
    """
    found = _SENTIMENT if task.name.startswith("vader_") else CLOZES.get(task.name)
    if found is None:
        raise ConfigError(
            f"{task.name} ({task.kind}) has no cloze prompt for a masked language model; take a causal model, one of "
            f"{', '.join(CLOZES)}, or your own rows with prompt, choices and label"
        )
    prompt, words = found
    return replace(task, prompt=prompt, words=words, example=partial(_filled, prompt, words, task.target))


def own_cloze_task(task: Task, mask_token: str) -> Task:
    """Return the task of a user's own data for a masked model: the choice goes to ``[MASK]``, else to the end.

    ``mask_token``, the tokenizer's own, counts as ``[MASK]``.

    Raises:
        ConfigError: its rows are texts, completions or messages, which a masked model cannot be trained on.
    """
    if task.kind != "classification":
        raise ConfigError(
            f"{task.name} is for a causal model ({task.prompt}: {task.kind}), and this is a masked language model; "
            "give rows with prompt, choices and label, the prompt with [MASK] where the choice belongs"
        )
    return replace(task, prompt=task.prompt.replace("{choice}", GAP), example=partial(_own, task, mask_token))


def refuse_gaps(task: Task) -> Task:
    """Return the task of a user's own data for a causal model, where a row with ``[MASK]`` is a `DataError`."""

    def example(row: Mapping[str, Any]) -> Example:
        found = task.example(row)
        if GAP in found.prompt:
            raise DataError(
                f'field "prompt" holds {GAP}, which only a masked language model fills; this is a causal one: let the '
                "choice follow the prompt, or take a masked model"
            )
        return found

    return replace(task, example=example)


def _filled(template: str, words: tuple[str, ...], label: str, row: Mapping[str, Any]) -> Example:
    before, after = (part.format_map(_Stripped(row)) for part in template.split(GAP))
    return Example(before.rstrip(" "), words, index_field(row, label, len(words)), suffix=after)


class _Stripped(dict[str, str]):
    """The fields of a row without leading and trailing spaces."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__()
        self._row = row

    def __missing__(self, name: str) -> str:
        return text_field(self._row, name).strip()


def _own(task: Task, mask_token: str, row: Mapping[str, Any]) -> Example:
    found = task.example(row)
    before, *after = found.prompt.replace(mask_token, GAP).split(GAP)
    if len(after) > 1:
        raise DataError(f'field "prompt" holds {GAP} {len(after)} times, expected once')
    if not after:
        return found
    space = " " if before != (stripped := before.rstrip(" ")) else ""
    choices = tuple(choice if choice.startswith(" ") else space + choice for choice in found.choices)
    return replace(found, prompt=stripped, choices=choices, suffix=after[0])


class ClozeEncoder:
    """Encode examples for a masked model and context length (tokens), counting truncated ones.

    A row is the text with mask tokens in the place of the choice; choices with the same number of tokens share a row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task, context_length: int):
        check_fast(tokenizer)
        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"{type(tokenizer).__name__} has no mask token, but the model is a masked language model; use the "
                "tokenizer that the model was trained with"
            )
        self._tokenizer = tokenizer
        self._task = task
        self._start, self._end = special_tokens(tokenizer)
        self.context_length = context_length
        self.truncated = 0
        self.doubled: Counter[str] = Counter()
        self._word = lru_cache(maxsize=1024)(self._word_tokens)

    def encode(self, example: Example) -> Encoded:
        """Return the rows of an example. A choice without tokens, or longer than the context, is a `DataError`."""
        words = [self._word(choice) for choice in example.choices]
        sizes = dict.fromkeys(map(len, words))
        room = self.context_length - len(self._start) - len(self._end) - max(sizes)
        split = {size: self._split(example, size) for size in sizes}
        self.truncated += any(len(before) + len(after) > room for before, after in split.values())
        rows = tuple(self._row(words, size, before, after, room) for size, (before, after) in split.items())
        return Encoded(example, rows, rows)

    def _split(self, example: Example, size: int) -> tuple[Tokens, Tokens]:
        """The tokens before and after ``size`` masks in the place of the choice."""
        gap = self._tokenizer.mask_token * size
        found = tokenised(self._tokenizer, example.prompt + gap + example.suffix)
        ids, start = tuple(found["input_ids"]), len(example.prompt)
        # By place, not by token: the text itself may hold a mask token.
        first = next(i for i, (_, end) in enumerate(found["offset_mapping"]) if end > start)
        if set(ids[first : first + size]) != {self._tokenizer.mask_token_id}:
            raise ModelError(
                f"{type(self._tokenizer).__name__} splits its mask token {self._tokenizer.mask_token!r} within a "
                f"text: it read {ids[first : first + size]} there, expected {self._tokenizer.mask_token_id}"
            )
        before, after = ids[:first], ids[first + size :]
        if self._start and before[: len(self._start)] == self._start:
            self.doubled[self._tokenizer.decode(list(self._start))] += 1
            before = before[len(self._start) :]
        if self._end and after[-len(self._end) :] == self._end:
            self.doubled[self._tokenizer.decode(list(self._end))] += 1
            after = after[: -len(self._end)]
        return before, after

    def _row(self, words: list[Tokens], size: int, before: Tokens, after: Tokens, room: int) -> Row:
        """The row of all choices of ``size`` tokens; a long text loses its beginning first, then its end."""
        after = after[:room]
        kept = room - len(after)
        before = self._start + before[max(0, len(before) - kept) :]
        places = tuple(range(len(before), len(before) + size))
        targets = tuple(Target(choice, places, word) for choice, word in enumerate(words) if len(word) == size)
        return Row(before + (self._tokenizer.mask_token_id,) * size + after + self._end, targets)

    def _word_tokens(self, choice: str) -> Tokens:
        ids = tuple(tokenised(self._tokenizer, choice)["input_ids"])
        if not ids or len(ids) > self.context_length - len(self._start) - len(self._end):
            raise DataError(
                f'field "{self._task.target}": the choice {choice!r} has {len(ids)} tokens, expected 1 or more that '
                f"fit into the context of {self.context_length}"
            )
        return ids
