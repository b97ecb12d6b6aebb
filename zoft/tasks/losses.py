"""The training loss of a batch, micro-batch by micro-batch: from the log-probabilities of its choices."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from zoft.model.architecture import position_start, unwrapped
from zoft.tasks.batches import Batch, HostBatch, PaddedRows, host_batch, length_step, readable_filler
from zoft.tasks.packing import packable
from zoft.tasks.types import Encoded, Task, Weighted

Objective = Callable[[Any, Sequence[Encoded]], Weighted]  # of a model and examples; to be minimised

_PLAIN = {"output_router_logits": False, "output_attentions": False, "output_hidden_states": False}
_CHUNK = 2**24  # logits upcast at a time: 64 MB of float32


class TrainingLoss:
    """The training loss of a task: ``(model, encoded) -> Weighted``, differentiable.

    The last host batch is kept: both ends of a probe read the same one.
    """

    def __init__(self, task: Task, filler: int) -> None:
        self.task, self.filler = task, filler
        self._last: tuple[tuple[Any, ...], Sequence[Encoded], HostBatch] | None = None

    def __call__(self, model: Any, encoded: Sequence[Encoded]) -> Weighted:
        """Return the loss of ``encoded``, without waiting for the device."""
        return loss(model, self.task, self.host_batch(model, encoded).to(model.device))

    def host_batch(self, model: Any, encoded: Sequence[Encoded]) -> HostBatch:
        """Return ``encoded`` as rows that ``model`` can read, in host memory."""
        settings = (length_step(model.dtype), packable(model))
        key = (*settings, *map(id, encoded))
        if self._last is None or self._last[0] != key:
            # The examples are kept, so that no others can get their ids.
            self._last = key, list(encoded), host_batch(encoded, readable_filler(self.filler, model), *settings)
        return self._last[2]


def losses_of(objective: Objective, model: Any, batch: Sequence[Encoded], count: int) -> Iterator[Weighted]:
    """Yield the objective on ``count`` micro-batches of ``batch``, evaluated lazily."""
    for part in micro_batches(batch, count):
        yield objective(model, part)


def micro_batches(batch: Sequence[Encoded], count: int) -> list[Sequence[Encoded]]:
    """Return ``batch`` in ``count`` parts, or fewer, all of one size but the last."""
    size = -(-len(batch) // count)
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def mean(parts: Iterable[Weighted]) -> torch.Tensor:
    """Return the mean over all ``parts``, whose sums are added in float64."""
    first, *rest = parts
    return sum(rest, start=first).value


def value(parts: Iterable[Weighted]) -> torch.Tensor:
    """Return `mean` without a gradient, keeping no part and not waiting for the device."""
    total, weight = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        total, weight = part.total.detach() + total, weight + part.weight
    return total / weight


def backward(parts: Iterable[Weighted], parameters: Sequence[torch.nn.Parameter]) -> float:
    """Compute the gradient of the mean over all ``parts`` into the ``grad`` of ``parameters``; return that mean.

    Each part is freed by its backward pass, so only one is in memory. The sums are differentiated and the gradient is
    divided at the end, when the weight is known.
    """
    total, weight = 0.0, 0
    for part in parts:
        part.total.backward()
        total, weight = total + float(part.total.detach()), weight + part.weight
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.div_(weight)
    return total / weight


class BatchLoss:
    """The objective on a batch as a closure: its mean, or by `parts` its micro-batches, for gradients of the head."""

    def __init__(self, losses: Callable[[], Iterable[Weighted]]) -> None:
        self._losses = losses

    def __call__(self) -> torch.Tensor:
        """Return the mean, without a gradient."""
        return value(self._losses())

    def parts(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield sum and weight of each micro-batch, in the graph of autograd."""
        for part in self._losses():
            yield part.total, part.weight


def loss(model: torch.nn.Module, task: Task, batch: Batch) -> Weighted:
    """Return the training loss of a batch, differentiable (arXiv 2305.17333).

    Classification: cross-entropy over the mean log-probabilities of the choices, weighted by examples. Choice,
    generation and text: cross-entropy of the gold tokens, weighted by tokens.
    """
    sums, counts = choice_sums(model, batch.rows)
    if task.kind == "classification":
        return Weighted(choice_cross_entropy(sums / counts, batch).sum(), weight(task, batch))
    return Weighted(-sums[batch.gold].sum(), weight(task, batch))


def weight(task: Task, batch: Batch | HostBatch) -> int:
    """Return the number that the training loss of a batch is divided by: of examples, or of target tokens."""
    return batch.examples if task.kind == "classification" else batch.gold_tokens


def choice_cross_entropy(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy ``(examples,)`` of the gold choice, with the scores ``(choices,)`` of an example as its logits."""
    # One more row takes the choices that pad a batch (`zoft.tasks.buckets`).
    table = scores.new_full((batch.examples + 1, batch.columns), -torch.inf)
    table = table.index_put((batch.example, batch.column), scores)[: batch.examples]
    return torch.logsumexp(table, dim=1) - scores[batch.gold]


def choice_sums(model: torch.nn.Module, rows: PaddedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability (float64) and the number of tokens of every choice, both ``(choices,)``."""
    log_probs = target_log_probs(model, rows).double()
    # A table and a sum along it: indexed addition is not deterministic on a GPU.
    table = log_probs.new_zeros(len(rows.counts), rows.most)
    return table.index_put((rows.segment, rows.place), log_probs).sum(dim=1), rows.counts


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
