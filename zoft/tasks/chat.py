"""Conversations as text: rendered by the tokenizer's chat template, with the stretches that are trained.

A template may rewrite earlier turns (Qwen3 drops their reasoning), merge them or add text, so a turn is found in the
whole conversation: its content is replaced by a placeholder, and the two texts are compared.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from zoft.errors import DataError, shown
from zoft.tasks.deadline import within
from zoft.tasks.rows import whole_text
from zoft.tasks.types import Example

Turns = Sequence[Mapping[str, str]]
Span = tuple[int, int]

SECONDS = 5.0  # for all texts of one conversation
LONGEST = 10_000_000  # characters of a rendered conversation
_PLACEHOLDER = "7391846205"  # digits: no template changes their case or strips them


class TemplateError(DataError):
    """A conversation that the chat template cannot render; other rows may be fine."""


class ChatTemplate:
    """The chat template of a tokenizer, and the date that it is given (default: today).

    ``dated`` is whether a conversation has read the date so far (Llama 3.2 writes it into the system turn).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date | None = None) -> None:
        self._tokenizer = tokenizer
        self.date = date or datetime.date.today()
        self.dated = False
        self._template: str | None = None

    def example(self, messages: Any) -> Example:
        """Return a conversation as an example whose ``spans`` are the assistant's turns, end-of-turn marks included.

        ``messages`` is a list of ``{"role": ..., "content": ...}``. A span starts where the template's prompt for the
        assistant ends, else where the turn's content starts.

        Raises:
            TemplateError: the template raises an error, hides a turn of the assistant, or writes it such that it cannot
                be found.
            DataError: the messages are not valid, or the template takes more than `SECONDS`.
        """
        turns = _checked(messages)
        try:
            return within(SECONDS, lambda: self._example(turns))
        except TimeoutError as error:
            raise DataError(f'field "messages": the chat template {error}') from error

    def _example(self, turns: Turns) -> Example:
        whole = self._render(turns)
        assistant = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        return Example("", (whole,), spans=tuple(self._span(whole, turns, i) for i in assistant))

    def _span(self, whole: str, turns: Turns, i: int) -> Span:
        """The stretch of ``whole`` that turn ``i`` is trained on."""
        before = self._content(whole, turns, i - 1) if i else (0, 0)
        found = self._content(whole, turns, i, after=before[1] if before else None)
        if found is None:
            raise TemplateError(f'field "messages": the chat template hides turn {i + 1}, an answer to be trained on')
        start, stop = found
        if not whole[start:stop].strip():
            raise TemplateError(f'field "messages": the chat template leaves nothing of turn {i + 1}')
        return self._prompt_end(whole, turns, i, before, start), stop + self._mark(whole, turns, i, stop)

    def _content(self, whole: str, turns: Turns, i: int, after: int | None = None) -> Span | None:
        """The stretch of ``whole`` that is the content of turn ``i``, as the template writes it; None if not found.

        A template that writes more than one stretch of a turn differently (its reasoning, then its answer) gives all
        from the first on, but nothing before ``after``.
        """
        parts = self._around(turns, i)
        if parts is None or not whole.endswith(parts[1]):
            return None
        head, tail = parts
        start, stop = _shared_length(head, whole), len(whole) - len(tail)
        if start < len(head) and (after is None or start < after):
            return None
        return (start, stop) if start <= stop else None

    def _prompt_end(self, whole: str, turns: Turns, i: int, before: Span | None, start: int) -> int:
        """Where the template's prompt for turn ``i`` ends: at ``start`` of its content, or in front of it."""
        earlier = turns[:i]
        try:
            parts = self._around(earlier, i - 1, prompt=True) if earlier else None
            if before and parts and whole[before[1] :].startswith(parts[1]) and before[1] + len(parts[1]) <= start:
                return before[1] + len(parts[1])
            prompt = self._render(earlier, prompt=True)
        except TemplateError:  # the beginning of a conversation need not be one
            return start
        return len(prompt) if whole.startswith(prompt) and len(prompt) <= start else start

    def _mark(self, whole: str, turns: Turns, i: int, stop: int) -> int:
        """The length of the end mark of turn ``i``, whose content ends at ``stop``."""
        try:
            parts = self._around(turns[: i + 1], i)
        except TemplateError:
            return 0
        if parts is None:
            return 0
        mark, following = parts[1], whole[stop : stop + len(parts[1])]
        if following == mark:
            return len(mark)
        # The last turn ends in another way (Phi-3 adds its end token); what is left of both is cut behind a mark.
        shared = mark[: _shared_length(mark, following)]
        return 1 + max(shared.rfind(end) for end in ">]\n ")

    def _around(self, turns: Turns, i: int, prompt: bool = False) -> tuple[str, str] | None:
        """The text before and after the content of turn ``i``; None if it is not written exactly once."""
        placeholder = _PLACEHOLDER
        while any(placeholder in turn["content"] for turn in turns):
            placeholder += "7"
        blanked = [{**turn, "content": placeholder} if k == i else turn for k, turn in enumerate(turns)]
        parts = self._render(blanked, prompt).split(placeholder)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _render(self, turns: Turns, prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                chat_template=self._dated_template(),
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # a template is a program: it can raise whatever Python can
            reason = shown(str(error) or type(error).__name__, 200)
            raise TemplateError(f'field "messages": the chat template refuses it ({reason})') from error
        if not isinstance(text, str) or len(text) > LONGEST:
            size = f"{len(text):,} characters" if isinstance(text, str) else type(text).__name__
            raise TemplateError(f'field "messages": the chat template gives {size}, expected at most {LONGEST:,}')
        return text

    def _dated_template(self) -> str:
        """The template with its own ``strftime_now``, which gives `date` instead of the present one."""
        if self._template is None:
            # Each text is compiled in an environment of its own, and kept. The comment takes one newline with it.
            self._template = f"{{# of {id(self)} #}}\n{self._tokenizer.get_chat_template()}"
            _compile_jinja_template(self._template).environment.globals["strftime_now"] = self._strftime
        return self._template

    def _strftime(self, form: str) -> str:
        self.dated = True
        return datetime.datetime.combine(self.date, datetime.time()).strftime(form)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError("messages need a chat template and this tokenizer has none; give prompt and completion instead")


def _shared_length(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _checked(messages: Any) -> Turns:
    if not isinstance(messages, list) or not messages:
        raise DataError('field "messages" is not a list of {"role", "content"} objects')
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(f'field "messages": turn {number} has no "role" and "content" texts')
        whole_text(turn["role"] + turn["content"], "messages")
    if messages[0]["role"] == "assistant":
        raise DataError('field "messages" starts with the assistant, expected a system or user turn first')
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError('field "messages" has no turn of the assistant, nothing to train on')
    return messages
