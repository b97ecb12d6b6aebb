"""The tuner that a meta-training starts with: its networks, and scales measured at the base for a warm start."""

from collections.abc import Iterator, Sequence

import torch

from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.controls import energy_scales, gradient_energy
from zoft.metatrain.rounding import rounding
from zoft.metatrain.sampling import Batches, TaskData, batch_of
from zoft.metatrain.signal import Losses, drawn_losses, measure_signal, signal_scales
from zoft.tasks import collate, pad_id
from zoft.tasks.batches import readable_filler
from zoft.tuner.networks import PertNN, group_of
from zoft.tuner.normalisation import full_sizes
from zoft.weights.blocks import Block
from zoft.weights.streamed import streaming

ENERGY_BATCHES = 16
SIGNAL_BATCHES = 16  # of each task


def untrained_tuner(config: MetatrainConfig, blocks: Sequence[Block]) -> PertNN:
    """Return the networks that ``config`` describes for ``blocks``."""
    return PertNN(
        [block.name for block in blocks],
        levels=config.granularity,
        inputs=config.inputs,
        activation=config.activation,
        hidden=config.hidden,
        recurrent=config.recurrent,
        effective_size=config.effective_size,
        seed=config.seed,
    )


def warm_start_scales(config: MetatrainConfig, blocks: Sequence[Block], batches: Batches) -> tuple[torch.Tensor, int]:
    """Return the scales that ``config.warm_start`` asks for, ``(n,)``, and the forward passes that they cost."""
    if config.warm_start == "energy":
        return energy_scales(measured_energy(config, blocks, batches), full_sizes(blocks)), 3 * ENERGY_BATCHES
    return _measured_signal(config, blocks, batches), 5 * SIGNAL_BATCHES * len(batches.tasks)


def measured_energy(config: MetatrainConfig, blocks: Sequence[Block], batches: Batches) -> torch.Tensor:
    """Return the gradient energy of the blocks at the present weights, ``(n,)``, over batches of all tasks."""
    with rounding(blocks, config.dtype, config.seed):
        return gradient_energy(blocks, (batches.closure(number) for number in range(ENERGY_BATCHES)))


def _measured_signal(config: MetatrainConfig, blocks: Sequence[Block], batches: Batches) -> torch.Tensor:
    """Signal over Fisher trace of every kind at the present weights, the geometric mean over the tasks."""
    kinds = [group_of(block.name, "kind") for block in blocks]
    generator = torch.Generator().manual_seed(config.seed)
    scales = [
        signal_scales(measure_signal(blocks, _drawn_losses(config, batches, data, generator)), kinds)
        for data in batches.tasks
    ]
    return torch.stack(scales).log().mean(0).exp()


def _drawn_losses(
    config: MetatrainConfig, batches: Batches, data: TaskData, generator: torch.Generator
) -> Iterator[Losses]:
    """The losses of `SIGNAL_BATCHES` batches of a task, in float32, which products of gradients need."""
    model = batches.loaded.model
    filler = readable_filler(pad_id(batches.loaded.tokenizer), model)
    for number in range(SIGNAL_BATCHES):
        batch = batch_of(data.prepared.train, config, config.seed, number)
        with streaming(model):
            losses = drawn_losses(model, data.prepared.task, collate(batch, filler, model.device), generator)
        yield losses
