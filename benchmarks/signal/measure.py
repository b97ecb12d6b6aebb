"""Measure signal, noise and curvature of every block at the present weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zoft import tasks
from zoft.metatrain.gradient import gradients
from zoft.metatrain.signal import drawn_losses, squared, unbiased
from zoft.model.load import Loaded
from zoft.noise.direction import NoiseDirection
from zoft.tasks import Encoded, Task, collate, pad_id
from zoft.weights.blocks import Block
from zoft.weights.perturbed import PerturbedWeights

PARTS = 4  # of the batches; their spread gives the standard errors
RADIUS = 1e-3  # of the walks along which curvature is measured: as far as probes and steps go


@dataclass(frozen=True)
class Signal:
    """Measurements at one point; lists have a number for each block, ``curvature`` one for each draw.

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
    loaded: Loaded,
    blocks: Sequence[Block],
    task: Task,
    batches: Sequence[Sequence[Encoded]],
    *,
    draws: int,
    seed: int,
) -> Signal:
    """Measure over ``batches`` of equal size, as `zoft.metatrain.signal` does; ``PARTS`` divides their number."""
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
        loss, drawn, weight = drawn_losses(loaded.model, task, batch, generator)
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


@torch.no_grad()
def curvatures(
    loaded: Loaded,
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
            with PerturbedWeights(blocks, NoiseDirection(seed, draw), radius):
                sides.append(float(objective(loaded.model, batch).value))
        found.append((sum(sides) - 2 * float(objective(loaded.model, batch).value)) / RADIUS**2)
    return found
