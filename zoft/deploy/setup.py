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
from zoft.deploy.journal import HeaderLine
from zoft.events import Listener, Noted, Progress, Started, Warned
from zoft.model.architecture import vocabulary
from zoft.model.load import Loaded, load, save
from zoft.optim import ExactHead, FullObjective, LearnedScales, RecordOptimizer
from zoft.optim.core.exact import default_lr
from zoft.tasks import Encoded, Prepared, tokens_read, tokens_scored
from zoft.tasks.batches import readable_filler
from zoft.tasks.sharing import sharing
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
        date=config.date,
        vocabulary=vocabulary(loaded.model),
        **settings,
    )
    for warning in prepared.warnings:
        on_event(Warned(warning))
    if prepared.date is not None and config.date is None:
        on_event(Noted(f"the chat template writes a date into conversations: {prepared.date} is used"))
    return prepared


def warn_of_padding(loaded: Loaded, prepared: Prepared, on_event: Listener) -> None:
    """Check, before the first step, whether padding changes what the model computes; if so, report it."""
    encoded = (*prepared.train, *prepared.dev, *prepared.test)
    filler = readable_filler(tasks.pad_id(loaded.tokenizer), loaded.model)
    found = sharing(loaded.model, (row for one in encoded for row in one.rows), filler)
    if found.warning is not None:
        on_event(Warned(found.warning))


def make_optimizer(
    config: FinetuneConfig,
    choice: Choice,
    model: torch.nn.Module,
    batch: Callable[[], Sequence[Encoded]],
    full: FullObjective,
    rows: tuple[int, ...] | None = None,
) -> RecordOptimizer:
    """Return the optimizer of ``choice`` for ``model``; ``batch`` returns the examples of the coming step.

    ``rows`` are those of an exact head that move.
    """
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
    parts = choice.method.make_parts(config.options, steps=config.steps)
    return choice.method.optimizer(model, **settings, **parts, **exact_parts(config, model, rows))


def exact_parts(config: FinetuneConfig, model: torch.nn.Module, rows: tuple[int, ...] | None) -> dict[str, Any]:
    """Return what an optimizer takes for exact gradients of ``model``; ``rows`` of its head move, None: all."""
    if config.exact == "none":
        return {}
    return {"exact": ExactHead(model=model, rows=rows, lr=config.exact_lr), "body": config.body}


def exact_rows(config: FinetuneConfig, prepared: Prepared) -> tuple[int, ...] | None:
    """Return the rows of an exact head that move: the tokens of the answers of a classification task; None: all."""
    if config.exact == "none" or prepared.task.kind != "classification":
        return None
    return tuple(sorted(set(tokens_scored(prepared.train))))


def with_exact_lr(config: FinetuneConfig, header: HeaderLine | None, rows: tuple[int, ...] | None) -> FinetuneConfig:
    """Return ``config`` with the learning rate of exact blocks: given, else that of ``header``, else the default."""
    if config.exact == "none" or config.exact_lr is not None:
        return config
    stored = header.config.get("exact_lr") if header is not None else None
    return config.model_copy(update={"exact_lr": stored or default_lr(rows)})


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
