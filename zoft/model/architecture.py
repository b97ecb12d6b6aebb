"""Properties of a loaded model: masked or causal, its first position, its context length."""

import sys

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zoft.model import adapters


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the transformers model inside ``model``, without PEFT's wrapper, which hides its class and arguments."""
    return getattr(model, "get_base_model", lambda: model)()


def is_masked(model: torch.nn.Module) -> bool:
    """Return whether ``model`` is a masked language model: it reads both ways and fills gaps."""
    return type(unwrapped(model)).__name__.endswith("ForMaskedLM")


def position_start(model: torch.nn.Module) -> int:
    """Return the position of a row's first token: 0, but ``padding_idx + 1`` in the RoBERTa family."""
    embeddings = getattr(getattr(unwrapped(model), "base_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens that model and tokenizer both allow; ``sys.maxsize`` if neither has a limit."""
    text = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limits = [getattr(text, name, None) for name in names]
    taken = position_start(model) + adapters.virtual_tokens(model)
    positions = [int(limit) - taken for limit in limits if limit]
    return min([*positions, tokenizer.model_max_length or sys.maxsize, sys.maxsize])


def vocabulary(model: torch.nn.Module) -> int:
    """Return the number of token ids that ``model`` can both read and predict; ``sys.maxsize`` if unknown."""
    base, sizes = unwrapped(model), [sys.maxsize]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            weight = getattr(getattr(base, name)(), "weight", None)
        except (AttributeError, NotImplementedError):
            continue
        sizes += [] if weight is None else [len(weight)]
    return min(sizes)
