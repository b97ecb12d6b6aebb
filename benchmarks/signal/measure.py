"""Signal, noise and curvature of every block, at the weights as they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from zoft import models, tasks
from zoft.blocks import Block
from zoft.noise import Direction
from zoft.perturb import PerturbedWeights
from zoft.tasks import Batch, Encoded, Task, collate, pad_id
from zoft.tasks.score import choice_cross_entropy, choice_sums

PARTS = 4  # of the batches; their spread gives the standard errors
RADIUS = 1e-3  # of the walks along which curvature is measured: as far as probes and steps go


@dataclass(frozen=True)
class Signal:
    """What was measured at one point; lists have a number for each block, ``curvature`` one for each draw.

    ``signal`` is ``|E g_i|^2``, ``noise`` the variance of a single example's gradient around it (trace), ``fisher`` the
    trace of the Fisher matrix; ``signal_parts`` has the signal from each quarter of the batches. ``curvature`` is ``z^T
    H z`` along noise on all blocks, whose mean the Fisher traces should add up to.
    """

    loss: float
    names: list[str]
    sizes: list[int]
    signal: list[float]
    signal_parts: list[list[float]]
    noise: list[float]
    fisher: list[float]
    curvature: list[float]


def measure(
    loaded: models.Loaded,
    blocks: Sequence[Block],
    task: Task,
    batches: Sequence[Sequence[Encoded]],
    *,
    draws: int,
    seed: int,
) -> Signal:
    """Measure over ``batches`` of equal size; ``PARTS`` divides their number.

    With ``b`` examples a batch and ``M`` batches, ``(|sum g|^2 - sum |g|^2) / (M (M - 1))`` has the mean ``|E g|^2``:
    products of one batch with itself, which hold its noise, are left out. The Fisher trace is that of labels drawn
    from the model (arXiv 2305.14342, section 2.3): for a mean over ``N`` labels ``N |g~|^2``.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = [torch.zeros_like(block.parameter) for block in blocks]
    part = [torch.zeros_like(block.parameter) for block in blocks]
    squares, fisher = torch.zeros(2, len(blocks), dtype=torch.float64)
    part_squares = torch.zeros_like(squares)
    parts, losses, per_part = [], [], len(batches) // PARTS

    def add(i: int, gradient: torch.Tensor) -> None:
        part[i] += gradient
        part_squares[i] += squared(gradient)

    def add_fisher(i: int, gradient: torch.Tensor) -> None:
        fisher[i] += weight * squared(gradient)

    for number, examples in enumerate(batches, start=1):
        batch = collate(examples, pad_id(loaded.tokenizer), loaded.model.device)
        loss, drawn, weight = losses_of(loaded.model, task, batch, generator)
        with gradients(blocks, add):
            loss.backward(retain_graph=True)
        with gradients(blocks, add_fisher):
            drawn.backward()
        losses.append(float(loss.detach()))
        if number % per_part == 0:
            parts.append(unbiased(torch.stack([squared(one) for one in part]), part_squares, per_part).tolist())
            for total, one in zip(sums, part, strict=True):
                total += one
                one.zero_()
            squares += part_squares
            part_squares.zero_()
    count = len(batches)
    signal = unbiased(torch.stack([squared(one) for one in sums]), squares, count)
    return Signal(
        loss=sum(losses) / count,
        names=[block.name for block in blocks],
        sizes=[block.size for block in blocks],
        signal=signal.tolist(),
        signal_parts=parts,
        noise=(len(batches[0]) * (squares / count - signal)).tolist(),
        fisher=(fisher / count).tolist(),
        curvature=curvatures(loaded, blocks, task, batches, draws, seed),
    )


def unbiased(of_sum: torch.Tensor, sum_of: torch.Tensor, count: int) -> torch.Tensor:
    """Return the unbiased estimate of ``|E g|^2`` from ``|sum g|^2`` and ``sum |g|^2`` over ``count`` draws.

    >>> unbiased(torch.tensor(16.0), torch.tensor(10.0), 2)  # of 1 and 3: their product
    tensor(3.)
    """
    return (of_sum - sum_of) / (count * (count - 1))


def squared(tensor: torch.Tensor) -> torch.Tensor:
    """Return the squared length in float64."""
    return torch.linalg.vector_norm(tensor).double() ** 2


def losses_of(
    model: Any, task: Task, batch: Batch, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the training loss, the same for labels drawn from the model, and over how many labels both are means."""
    with _captured(model) as outputs:
        sums, counts = choice_sums(model, batch.rows)
    if task.kind == "classification":
        scores = sums / counts
        table = scores.new_full((batch.examples, int(batch.column.max()) + 1), -torch.inf)
        table[batch.example, batch.column] = scores.detach()
        column = torch.multinomial(table.softmax(1), 1, generator=generator)[:, 0]
        place = {(b, c): i for i, (b, c) in enumerate(zip(batch.example.tolist(), batch.column.tolist(), strict=True))}
        gold = torch.tensor([place[b, c] for b, c in enumerate(column.tolist())])
        drawn = choice_cross_entropy(scores, Batch(**vars(batch) | {"gold": gold}))
        return choice_cross_entropy(scores, batch).mean(), drawn.mean(), batch.examples
    rows = batch.rows
    logits = outputs[0].logits
    at_targets = logits[rows.row, rows.position - (rows.input_ids.shape[1] - logits.shape[1])].float()
    tokens = torch.multinomial(at_targets.detach().softmax(1), 1, generator=generator)[:, 0]
    return (
        -sums.sum() / counts.sum(),
        torch.nn.functional.cross_entropy(at_targets, tokens),
        len(tokens),
    )


@torch.no_grad()
def curvatures(
    loaded: models.Loaded,
    blocks: Sequence[Block],
    task: Task,
    batches: Sequence[Sequence[Encoded]],
    draws: int,
    seed: int,
) -> list[float]:
    """Return ``z^T H z`` of the loss of a batch for noise on all blocks, one a draw, each on a batch of its own."""
    objective = tasks.objective("loss", task, loaded.tokenizer, batch_size=1)
    found = []
    for draw in range(draws):
        batch = batches[draw % len(batches)]
        sides = []
        for radius in (RADIUS, -RADIUS):
            with PerturbedWeights(blocks, Direction(seed, draw), radius):
                sides.append(float(objective(loaded.model, batch).value))
        found.append((sum(sides) - 2 * float(objective(loaded.model, batch).value)) / RADIUS**2)
    return found


@contextmanager
def gradients(blocks: Sequence[Block], take: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Hand each gradient of the backward pass inside to ``take`` as it arrives, with the number of its block."""

    def hook(i: int) -> Callable[[torch.Tensor], None]:
        def taken(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            take(i, parameter.grad)
            parameter.grad = None

        return taken

    handles = [block.parameter.register_post_accumulate_grad_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _captured(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Collect what ``model`` puts out inside."""
    outputs: list[Any] = []
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
