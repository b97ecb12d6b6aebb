"""Conversations: rendered by the tokenizer's chat template, trained on every turn of the assistant."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from zoft.errors import DataError
from zoft.tasks.types import Example


def conversation(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return a conversation as an example whose ``spans`` are the assistant's turns, end-of-turn marks included.

    ``messages`` is a list of ``{"role": ..., "content": ...}``. A span starts where the template's prompt for the
    assistant ends, and ends where the conversation up to that turn does; both are found in the whole text, so a
    template that rewrites earlier turns is no obstacle.
    """
    turns = _checked(messages)
    whole = _render(turns, tokenizer)
    spans = tuple(_span(turns, i, whole, tokenizer) for i, turn in enumerate(turns) if turn["role"] == "assistant")
    return Example("", (whole,), spans=spans)


def _span(
    turns: Sequence[Mapping[str, str]], i: int, whole: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    start = _shared_length(_render(turns[:i], tokenizer, prompt=True), whole)
    end = _shared_length(_render(turns[: i + 1], tokenizer), whole)
    if start >= end:
        raise DataError(f'field "messages": the chat template hides turn {i + 1} of the assistant, nothing to train on')
    return start, end


def _shared_length(one: str, other: str) -> int:
    """Length of the common start of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _render(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise DataError(f'field "messages": the chat template refuses it ({error})') from error


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` if the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise DataError("messages need a chat template and this tokenizer has none; give prompt and completion instead")


def _checked(messages: Any) -> list[Mapping[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError('field "messages" is not a list of {"role", "content"} objects')
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise DataError(f'field "messages": turn {number} has no "role" and "content" texts')
    if messages[0]["role"] == "assistant":
        raise DataError('field "messages" starts with the assistant, expected a system or user turn first')
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError('field "messages" has no turn of the assistant, nothing to train on')
    return messages
