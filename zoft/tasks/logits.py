"""Logits of a model at the targets of a batch, and log-probabilities of these: nothing else is computed."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from zoft.model.architecture import position_start, unwrapped
from zoft.tasks.batches import PaddedRows

_PLAIN = {"output_router_logits": False, "output_attentions": False, "output_hidden_states": False}
_CHUNK = 2**24  # logits upcast at a time: 64 MB of float32


def target_log_probs(model: torch.nn.Module, rows: PaddedRows) -> torch.Tensor:
    """Return the log-probability of every target token, float32 ``(targets,)``; one forward pass."""
    needed = needed_logits(model, rows)
    return _log_probs(needed, rows.logit.to(needed.device), rows.token.to(needed.device)).to(rows.token.device)


def needed_logits(model: torch.nn.Module, rows: PaddedRows) -> torch.Tensor:
    """Return the logits ``(logits, vocabulary)`` that predict targets, each once; ``rows.logit`` indexes them.

    Where the model allows it, no other logits are computed.
    """
    base = unwrapped(model)
    inner = getattr(base, "base_model", base)
    gather = _Gather(rows)
    accepted = _parameters(type(base).forward)
    optional = {"position_ids": rows.position_ids + position_start(base), "use_cache": False}
    if inner is base:
        optional["logits_to_keep"] = rows.input_ids.shape[1] - rows.first_position
    _forget_longest(base)
    hook = inner.register_forward_hook(gather) if inner is not base else None
    try:
        logits = model(
            input_ids=rows.input_ids,
            attention_mask=_attention_mask(base, rows.attention_mask),
            **{name: value for name, value in optional.items() if name in accepted},
            **plain_outputs(base),
        ).logits
    finally:
        if hook is not None:
            hook.remove()
    return logits[0] if gather.done else gather.take(logits)


def plain_outputs(model: torch.nn.Module) -> dict[str, bool]:
    """Return the arguments that keep the forward pass of ``model`` to logits, whatever its configuration asks for.

    The router logits of a mixture of experts would bring a balancing loss, which no score holds.
    """
    return {name: value for name, value in _PLAIN.items() if name in _parameters(type(model).forward)}


def _forget_longest(model: Any) -> None:
    """Reset rotary embeddings with dynamic scaling, which keep the factor of the longest batch so far."""
    scaling = getattr(getattr(model, "config", None), "rope_parameters", None)
    if not isinstance(scaling, dict) or scaling.get("rope_type") != "dynamic":
        return
    module: Any
    for module in model.modules():
        original = getattr(module, "original_inv_freq", None)
        if original is not None and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = original.to(module.inv_freq.device, copy=True)
            module.max_seq_len_cached = module.original_max_seq_len


class _Gather:
    """Forward hook that passes only the hidden states of the targets to the head of a model, ``(1, logits, width)``.

    The logits of all tokens of a batch can take more memory than the model.
    """

    def __init__(self, rows: PaddedRows) -> None:
        self._rows, self.done = rows, False

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            return output
        self.done = True
        output["last_hidden_state"] = self.take(hidden)[None]
        return output

    def take(self, of_tokens: torch.Tensor) -> torch.Tensor:
        """Return ``(logits, width)`` of ``(rows, length, width)``, which may have fewer or more tokens on the left."""
        row, position = (at.to(of_tokens.device) for at in (self._rows.logit_row, self._rows.logit_position))
        return of_tokens[row, position + of_tokens.shape[1] - self._rows.input_ids.shape[1]]


def _attention_mask(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """The mask of packed rows in the form that the model's attention takes: "eager" adds it to the scores."""
    if mask.ndim == 2 or model.config._attn_implementation != "eager":
        return mask
    least = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, least)


def _log_probs(logits: torch.Tensor, logit: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Log-probability of ``token`` by row ``logit`` of ``logits``, both ``(targets,)``; upcasts some rows at a time."""
    rows = logits.split(max(1, _CHUNK // logits.shape[1]))
    norms = torch.cat([torch.logsumexp(part.float(), dim=1) for part in rows])
    return logits[logit, token].float() - norms[logit]


@lru_cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
