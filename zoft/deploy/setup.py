"""Make the model, the data and the optimizer of a run from its configuration."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from zoft import tasks
from zoft.deploy.choice import Choice
from zoft.deploy.config import EvalConfig, FinetuneConfig
from zoft.events import Listener, Progress, Started, Warned
from zoft.model.load import Loaded, load, save
from zoft.optim import FullObjective, LearnedScales, RecordOptimizer
from zoft.tasks import Encoded, Prepared, tokens_read
from zoft.tuner.normalisation import effective_sizes
from zoft.weights.blocks import trainable_blocks


def load_model(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Loaded:
    """Load the model to be trained, with ``tokenizer`` where it was read before."""
    return load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        fp32_vectors=True,
        tokenizer=tokenizer,
        device_map=config.device_map,
        adapter=config.adapter,
        seed=config.seed,
        bound_kernels=True,
    )


def save_model(loaded: Loaded, folder: Path, card: str, on_event: Listener) -> None:
    """Write the present weights to ``folder`` in the base's dtype, with ``card`` as its README."""
    on_event(Progress("saving", 0, 1))
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed right here
    save(loaded.model, loaded.tokenizer, folder, dtype=loaded.stored_dtype, card=card)


def prepare_data(config: FinetuneConfig, loaded: Loaded, on_event: Listener) -> Prepared:
    """Encode and check the data of a run; warnings become events."""
    prepared = encode_data(config, loaded, on_event)
    if not prepared.dev:
        on_event(Warned("no dev split: the weights of the last step are kept"))
    tasks.batch_indices(len(prepared.train), config.batch_size, config.seed, 0)  # fails early if too large
    return prepared


def encode_data(config: FinetuneConfig | EvalConfig, loaded: Loaded, on_event: Listener, **settings: Any) -> Prepared:
    """Return the splits of ``config`` encoded for ``loaded``, with further ``settings`` of `zoft.tasks.prepare`."""
    prepared = tasks.prepare(
        config.task,
        config.data,
        loaded.tokenizer,
        context_length=loaded.context_length,
        masked=loaded.masked,
        train_size=config.train_size,
        dev_size=config.dev_size,
        test_size=config.test_size,
        seed=config.seed,
        shots=config.shots,
        **settings,
    )
    for warning in prepared.warnings:
        on_event(Warned(warning))
    return prepared


def make_optimizer(
    config: FinetuneConfig,
    choice: Choice,
    model: torch.nn.Module,
    batch: Callable[[], Sequence[Encoded]],
    full: FullObjective,
) -> RecordOptimizer:
    """Return the optimizer of ``choice`` for ``model``; ``batch`` returns the examples of the coming step."""
    settings: dict[str, Any] = {
        "lr": choice.lr,
        "eps": choice.eps,
        "probes": config.q,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "master_weights": config.master_weights,
    }
    if not choice.method.first_order:
        settings["full"] = full
    if choice.tuner is not None:
        networks, blocks = choice.tuner.networks.requires_grad_(False), trainable_blocks(model)
        settings["scales"] = LearnedScales(
            tuner=networks, sizes=lambda: effective_sizes(networks, model, blocks, tokens_read(batch()))
        )
    return choice.method.optimizer(model, **settings, **choice.method.make_parts(config.options, steps=config.steps))


def batch_of(prepared: Prepared, config: FinetuneConfig, step: int) -> list[Encoded]:
    """Return the examples of ``step``: a function of its number, so that there is nothing to restore."""
    indices = tasks.batch_indices(len(prepared.train), config.batch_size, config.seed, step)
    return [prepared.train[index] for index in indices]


def started(config: FinetuneConfig, prepared: Prepared, optimizer: RecordOptimizer, *, step: int) -> Started:
    """Return the event of a run that starts, or goes on, after ``step`` steps."""
    return Started(
        step=step,
        steps=config.steps,
        model=config.model,
        task=prepared.task.name,
        method=str(config.method),
        blocks=len(optimizer.blocks),
        parameters=sum(block.size for block in optimizer.blocks),
        train=len(prepared.train),
        dev=len(prepared.dev),
        test=len(prepared.test),
    )
