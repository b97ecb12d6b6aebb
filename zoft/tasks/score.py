"""Log-probabilities of choices, and the training losses made of them."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from zoft.models import is_masked, position_start, unwrapped
from zoft.tasks.batches import Batch, PaddedRows
from zoft.tasks.types import Task, Weighted

_CHUNK = 2**24  # logits upcast at a time: 64 MB of float32


def loss(model: torch.nn.Module, task: Task, batch: Batch) -> Weighted:
    """Return the training loss of a batch, differentiable (arXiv 2305.17333).

    Classification: cross-entropy over the mean log-probabilities of the choices, weighted by examples. Choice,
    generation and text: cross-entropy of the gold tokens, weighted by tokens.
    """
    sums, counts = choice_sums(model, batch.rows)
    if task.kind == "classification":
        return Weighted(choice_cross_entropy(sums / counts, batch).sum(), batch.examples)
    return Weighted(-sums[batch.gold].sum(), int(counts[batch.gold].sum()))


def choice_cross_entropy(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy ``(examples,)`` of the gold choice, with the scores ``(choices,)`` of an example as its logits."""
    table = scores.new_full((batch.examples, int(batch.column.max()) + 1), -torch.inf)
    table = table.index_put((batch.example, batch.column), scores)
    return torch.logsumexp(table, dim=1) - scores[batch.gold]


def choice_sums(model: torch.nn.Module, rows: PaddedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability (float64) and the number of tokens of every choice, both ``(choices,)``."""
    log_probs = target_log_probs(model, rows).double()
    # A table and a sum along it: adding at an index is not deterministic on a GPU.
    table = log_probs.new_zeros(len(rows.counts), int(rows.counts.max()))
    return table.index_put((rows.segment, rows.place), log_probs).sum(dim=1), rows.counts


def target_log_probs(model: torch.nn.Module, rows: PaddedRows) -> torch.Tensor:
    """Return the log-probability of every target token, float32 ``(targets,)``; one forward pass.

    Only the logits from the first target on are computed where the model can, and only those of targets are upcast.
    """
    base = unwrapped(model)
    masked = is_masked(base)
    accepted = _parameters(type(base).forward)
    optional = {
        "position_ids": rows.position_ids + position_start(base),
        "logits_to_keep": rows.logits_to_keep,
        "use_cache": False,
    }
    with _only_targets(base, rows) if masked else nullcontext():
        logits = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            **{name: value for name, value in optional.items() if name in accepted},
        ).logits
    row, position = rows.row, rows.position - (rows.input_ids.shape[1] - logits.shape[1])
    if masked:
        row, position = torch.zeros_like(row), torch.arange(len(row), device=row.device)
    step = max(1, _CHUNK // logits.shape[2])
    parts = zip(row.split(step), position.split(step), rows.token.split(step), strict=True)
    return torch.cat([_log_prob(logits[i, place].float(), token) for i, place, token in parts])


@contextmanager
def _only_targets(model: torch.nn.Module, rows: PaddedRows) -> Iterator[None]:
    """Hand the head of a masked model the hidden states of the targets alone, ``(1, targets, width)``.

    Such models take no ``logits_to_keep``, and the logits of every token of a batch can outweigh the model.
    """

    def gather(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][rows.row, rows.position][None]
        return output

    handle = model.base_model.register_forward_hook(gather)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


def _log_prob(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, token[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)


@lru_cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
