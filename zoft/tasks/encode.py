"""Examples as tokens: boundaries by character offsets, truncation from the left, one row for one-token choices."""

from collections import Counter
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from zoft.errors import DataError, ModelError, shown
from zoft.tasks.types import Encoded, Example, Row, Target, Task

Tokens = tuple[int, ...]


class Encoder:
    """Encode the examples of a task for a tokenizer and context length (tokens), counting truncated ones.

    ``doubled`` counts the texts that bring the token that is put at their start, or at their end: it is written once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task, context_length: int):
        check_fast(tokenizer)
        self._tokenizer = tokenizer
        self._task = task
        self.context_length = context_length
        self._start, _ = special_tokens(tokenizer)
        self.truncated = 0
        self.doubled: Counter[str] = Counter()
        self._known: dict[int, int] = {}

    def encode(self, example: Example) -> Encoded:
        """Return the rows of an example. A choice without tokens, or longer than the context, is a `DataError`."""
        before, doubled = self.truncated, self.doubled.copy()
        rows = (self._text_row(example),) if self._task.kind == "text" else self._choice_rows(example)
        prompt_ids = self._generation_prompt(example) if self._task.kind == "generation" else ()
        self.truncated = min(self.truncated, before + 1)  # count an example once
        self.doubled = doubled + Counter((self.doubled - doubled).keys())
        single = len(rows) == 1 or self._task.kind == "classification"
        return Encoded(example, rows, rows if single else (rows[example.label],), prompt_ids)

    def _choice_rows(self, example: Example) -> tuple[Row, ...]:
        texts = [example.full_text(choice) for choice in range(len(example.choices))]
        split = [_split(ids, ends, len(example.prompt)) for ids, ends in self._tokenised(texts)]
        split = [(self._without_start(prompt), self._ended(target)) for prompt, target in split]
        self._check_targets(example, [target for _, target in split])
        room = self.context_length - len(self._start) - max(len(target) for _, target in split)
        self.truncated += any(len(prompt) > room for prompt, _ in split)
        split = [(self._start + _last(prompt, room), target) for prompt, target in split]
        if not all(prompt for prompt, _ in split):
            raise DataError("there is no token before the choice to predict it from; give a longer prompt")
        return _rows(split)

    def _without_start(self, ids: Tokens) -> Tokens:
        """Return ``ids`` without the start tokens that they bring, which are put there anyway."""
        while self._start and ids[: len(self._start)] == self._start:
            ids = ids[len(self._start) :]
            self.doubled[self._tokenizer.decode(list(self._start))] += 1
        return ids

    def _ended(self, target: Tokens) -> Tokens:
        """Return a choice with one end token, where the task appends one."""
        end = self._tokenizer.eos_token_id
        if not self._task.append_eos or end is None:
            return target
        while target[-1:] == (end,):
            target = target[:-1]
            self.doubled[self._tokenizer.eos_token] += 1
        return (*target, end) if target else target

    def _check_targets(self, example: Example, targets: list[Tokens]) -> None:
        longest = self.context_length - max(len(self._start), 1)
        for choice, target in enumerate(targets):
            if not target or not example.choices[choice]:
                raise DataError(
                    f'field "{self._task.target}": choice {choice} ({example.choices[choice]!r}) has length 0'
                )
            if len(target) > longest:
                raise DataError(
                    f'field "{self._task.target}" has {len(target)} tokens, more than the context of '
                    f"{self.context_length} holds; shorten it or take a model with a longer context"
                )

    def _text_row(self, example: Example) -> Row:
        """One row trained on its spans, or on every token that has one before it."""
        ((ids, ends),) = self._tokenised([example.full_text(0)])
        spans = example.spans or ((0, ends[-1] if ends else 0),)
        wanted = [any(start < end <= stop for start, stop in spans) for end in ends]
        start = self._start if not example.spans else ()  # a chat template writes its own start token
        if start:
            brought = len(ids) - len(ids := self._without_start(ids))
            wanted = wanted[brought:]
        ids, wanted = start + ids, [False] * len(start) + wanted
        if len(ids) > self.context_length:
            self.truncated += 1
            ids, wanted = self._shortened(ids, wanted, keep_end=bool(example.spans))
        positions = tuple(i - 1 for i in range(1, len(ids)) if wanted[i])
        if not positions:
            raise DataError(
                f'field "{self._task.target}" leaves no token to predict in a context of {self.context_length}'
            )
        return Row(ids[:-1], (Target(0, positions, tuple(ids[i + 1] for i in positions)),))

    def _shortened(self, ids: Tokens, wanted: list[bool], keep_end: bool) -> tuple[Tokens, list[bool]]:
        """Truncate: a text keeps its start, a conversation its last turns and its start token if it has one."""
        if not keep_end:
            return ids[: self.context_length], wanted[: self.context_length]
        first = 1 if ids[0] == self._tokenizer.bos_token_id else 0
        cut = len(ids) - (self.context_length - first)
        return ids[:first] + ids[cut:], wanted[:first] + wanted[cut:]

    def _generation_prompt(self, example: Example) -> Tokens:
        room = self.context_length - min(self._task.max_new_tokens, self.context_length // 2) - len(self._start)
        ((ids, _),) = self._tokenised([example.prompt])
        ids = self._without_start(ids)
        self.truncated += len(ids) > room
        return self._start + _last(ids, room)

    def _tokenised(self, texts: list[str]) -> list[tuple[Tokens, list[int]]]:
        """Token ids and the character each token ends at, without special tokens."""
        found = tokenised(self._tokenizer, texts)
        offsets = found["offset_mapping"]
        return [
            # Share one integer object per token id: otherwise these integers are most of the memory of long rows.
            (tuple(map(self._known.setdefault, ids, ids)), [end for _, end in ends])
            for ids, ends in zip(found["input_ids"], offsets, strict=True)
        ]


def tokenised(tokenizer: PreTrainedTokenizerBase, text: Any) -> Any:
    """Return one or more texts as tokens with character offsets; `DataError` if the tokenizer refuses them."""
    try:
        return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise DataError(f"the tokenizer refuses the text ({shown(str(error), 200)})") from error


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ModelError` for a tokenizer without character offsets."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} has no character offsets; the model needs a fast tokenizer (tokenizer.json)"
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """Return the special tokens that the tokenizer adds before and after every text (BOS, CLS; EOS, SEP)."""
    ids, special = tokenizer("a")["input_ids"], set(tokenizer.all_special_ids)
    start = tuple(takewhile(lambda token: token in special, ids))
    end = tuple(takewhile(lambda token: token in special, reversed(ids[len(start) :])))
    return start, end[::-1]


def _split(ids: Tokens, ends: list[int], boundary: int) -> tuple[Tokens, Tokens]:
    """Split before the first token that ends after ``boundary``: one that straddles it belongs to the choice."""
    first = next((i for i, end in enumerate(ends) if end > boundary), len(ids))
    return ids[:first], ids[first:]


def _last(ids: Tokens, count: int) -> Tokens:
    return ids[max(0, len(ids) - max(count, 0)) :]


def _rows(split: list[tuple[Tokens, Tokens]]) -> tuple[Row, ...]:
    """One row for all choices where each is one token after the same prompt, else one row per choice."""
    prompts = {prompt for prompt, _ in split}
    if len(prompts) == 1 and all(len(target) == 1 for _, target in split):
        prompt = prompts.pop()
        return (Row(prompt, tuple(Target(i, (len(prompt) - 1,), target) for i, (_, target) in enumerate(split))),)
    return tuple(
        Row(
            prompt + target[:-1],
            (Target(i, tuple(range(len(prompt) - 1, len(prompt) + len(target) - 1)), target),),
        )
        for i, (prompt, target) in enumerate(split)
    )
