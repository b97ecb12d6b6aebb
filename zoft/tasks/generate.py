"""Greedy generation in left-padded batches, stopped by a pattern of the decoded text."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from zoft.model.architecture import unwrapped
from zoft.tasks.batches import pad, pad_id, readable_filler
from zoft.tasks.logits import plain_outputs
from zoft.tasks.sharing import sharing
from zoft.tasks.types import Row, Task


class _StopOnText(StoppingCriteria):
    """Stop a sequence once its generated text matches; token ids would miss merged tokens such as ``.\\n``."""

    def __init__(self, pattern: str, tokenizer: PreTrainedTokenizerBase, prompt_length: int):
        self._pattern = re.compile(pattern)
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = decode(self._tokenizer, input_ids[:, self._prompt_length :])
        return torch.tensor([bool(self._pattern.search(text)) for text in texts], device=input_ids.device)


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Return the greedy continuation of each prompt up to the task's stop, spaces stripped; one batch."""
    filler = readable_filler(pad_id(tokenizer), model)
    plain = [Row(tuple(prompt), ()) for prompt in prompts]
    rows = pad(plain, filler, model.device, sharing(model, plain, filler).step(model.dtype))
    length = rows.input_ids.shape[1]
    stop = [_StopOnText(task.stop, tokenizer, length)] if task.stop else []
    room = max(1, min(task.max_new_tokens, _context(model) // 2))  # the room that truncated prompts leave
    settings = _greedy(filler, room, _ends(model, tokenizer))
    with _without_settings(unwrapped(model)):
        output = model.generate(
            rows.input_ids,
            attention_mask=rows.attention_mask,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList(stop),
            **plain_outputs(unwrapped(model)),
        )
    return [_up_to(task.stop, text) for text in decode(tokenizer, output[:, length:])]


def _greedy(filler: int, new_tokens: int, ends: list[int] | None) -> GenerationConfig:
    """Settings of plain greedy search."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        max_new_tokens=new_tokens,
        pad_token_id=filler,
        eos_token_id=ends,
    )


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Hide the generation settings of the checkpoint, which stand in for every setting that is left out.

    Some have no neutral value to give instead: suppressed and forced tokens, biases, time limits, caches.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The end tokens of the tokenizer and of the checkpoint's generation settings."""
    known = getattr(unwrapped(model).generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(known if isinstance(known, list | tuple) else [known])]
    return sorted({one for one in found if isinstance(one, int) and not isinstance(one, bool)}) or None


def _context(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30)


def decode(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """Return generated ids as text, without special tokens and otherwise unchanged."""
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _up_to(stop: str | None, text: str) -> str:
    found = re.search(stop, text) if stop else None
    return (text[: found.end()] if found else text).strip()
