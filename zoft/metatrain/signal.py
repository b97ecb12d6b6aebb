"""Measure signal, noise and curvature of every block, which decide the gain of a zeroth-order step.

One step along ``u = s z`` at its best learning rate gains ``A^2 / (2 D C)``, with sums over the blocks of

    A = sum s_i^2 n_i                signal, n_i = |E g_i|^2
    D = sum s_i^2 (n_i + v_i / B)    squared gradient of a batch, v_i the variance of an example's
    C = sum s_i^2 h_i                trace of the curvature

For cross-entropy ``h_i`` is about the trace of the Fisher matrix, which labels drawn from the model measure by
first-order means (arXiv 2305.14342, section 2.3). So a block should have a large scale if its ratio ``n_i / h_i`` is
large; its gradient energy, which is mostly noise, does not measure that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from zoft.metatrain.gradient import gradients
from zoft.model.offload import zeros_placed_like
from zoft.tasks import Batch, Task
from zoft.tasks.logits import needed_logits
from zoft.tasks.losses import choice_cross_entropy, choice_sums
from zoft.weights.blocks import Block

Losses = tuple[torch.Tensor, torch.Tensor, int]
SMALLEST = 0.01  # ratio that scales are made of; an unbiased signal may come out negative


@dataclass(frozen=True)
class Signal:
    """Measurements of every block, each ``(n,)`` float64.

    ``signal`` is ``|E g|^2``, ``batch`` the mean squared gradient of a batch, ``fisher`` the Fisher matrix's trace.
    """

    signal: torch.Tensor
    batch: torch.Tensor
    fisher: torch.Tensor


def measure_signal(blocks: Sequence[Block], losses: Iterable[Losses]) -> Signal:
    """Measure the blocks on the batches of ``losses`` at the present weights, with one buffer of the weights' size.

    With gradients ``g`` of ``M`` batches, ``(|sum g|^2 - sum |g|^2) / (M (M - 1))`` has the mean ``|E g|^2``: products
    of one batch with itself, which hold its noise, are left out.

    Args:
        blocks: the blocks.
        losses: results of `drawn_losses` for at least two batches, five forwards each.
    """
    sums = [zeros_placed_like(block.parameter.detach()) for block in blocks]
    squares, of_drawn, fisher = torch.zeros(3, len(blocks), dtype=torch.float64)
    count = 0

    def add(i: int, gradient: torch.Tensor) -> None:
        sums[i] += gradient
        squares[i] += squared(gradient)

    def take_drawn(i: int, gradient: torch.Tensor) -> None:
        of_drawn[i] = squared(gradient)

    for loss, drawn, labels in losses:
        with gradients(blocks, add):
            loss.backward(retain_graph=True)
        of_drawn.zero_()  # the loss of a batch may not depend on a block
        with gradients(blocks, take_drawn):
            drawn.backward()
        fisher += labels * of_drawn
        count += 1
    signal = unbiased(torch.stack([squared(one) for one in sums]), squares, count)
    return Signal(signal, squares / count, fisher / count)


def unbiased(of_sum: torch.Tensor, sum_of: torch.Tensor, count: int) -> torch.Tensor:
    """Return the unbiased estimate of ``|E g|^2`` from ``|sum g|^2`` and ``sum |g|^2`` over ``count`` draws.

    >>> unbiased(torch.tensor(16.0), torch.tensor(10.0), 2)  # of 1 and 3: their product
    tensor(3.)
    """
    return (of_sum - sum_of) / (count * (count - 1))


def signal_scales(found: Signal, groups: Sequence[str]) -> torch.Tensor:
    """Return the raw scales ``(n,)``: each group's signal over its Fisher trace, that of the whole being 1.

    ``groups`` names the group of every block. A single block's ratio is mostly chance, a kind's is not.
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([order[name] for name in groups])
    signal, fisher = (
        torch.zeros(len(order), dtype=torch.float64).index_add(0, index, values)
        for values in (found.signal, found.fisher)
    )
    ratio = signal / fisher * (fisher.sum() / signal.sum())
    return ratio.nan_to_num(nan=1.0).clamp(min=SMALLEST)[index]


def drawn_losses(model: Any, task: Task, batch: Batch, generator: torch.Generator) -> Losses:
    """Return the training loss of ``batch``, the same for labels drawn from the model, and the number of labels.

    Both losses are differentiable, from one forward pass. A label is a choice in classification, else a token.
    """
    if task.kind == "classification":
        sums, counts = choice_sums(model, batch.rows)
        scores = sums / counts
        gold = _drawn_choices(scores.detach(), batch, generator)
        drawn = choice_cross_entropy(scores, Batch(**vars(batch) | {"gold": gold}))
        return choice_cross_entropy(scores, batch).mean(), drawn.mean(), batch.examples
    logits = needed_logits(model, batch.rows)
    at_targets = logits[batch.rows.logit.to(logits.device)].float()
    tokens = torch.multinomial(at_targets.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
    gold, drawn = (cross_entropy(at_targets, of.to(logits.device)) for of in (batch.rows.token, tokens))
    return gold, drawn, len(tokens)


def _drawn_choices(scores: torch.Tensor, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """A choice of every example, ``(examples,)``, numbered as ``batch.gold`` is."""
    shape = batch.examples, int(batch.column.max()) + 1
    table, numbers = scores.new_full(shape, -torch.inf), torch.zeros(shape, dtype=torch.long, device=scores.device)
    table[batch.example, batch.column] = scores
    numbers[batch.example, batch.column] = torch.arange(len(scores), device=scores.device)
    column = torch.multinomial(table.softmax(1).cpu(), 1, generator=generator).to(scores.device)
    return numbers.gather(1, column)[:, 0]


def squared(tensor: torch.Tensor) -> torch.Tensor:
    """Return the squared length in float64, on the CPU."""
    return (torch.linalg.vector_norm(tensor).double() ** 2).cpu()
