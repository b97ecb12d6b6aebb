"""Loss and metric of a model on a split: for ``zoft eval``, during a run, and of the checkpoint that a run wrote."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from zoft import tasks
from zoft.deploy.config import EvalConfig, FinetuneConfig
from zoft.deploy.result import EvalResult
from zoft.deploy.setup import encode_data, warn_of_padding
from zoft.errors import DivergedError
from zoft.events import Evaluated, Listener, Progress, silent
from zoft.memory import Trimmer, peak_memory_bytes, trim
from zoft.model.load import Loaded, load
from zoft.tasks import Encoded, Evaluation, Prepared
from zoft.weights.streamed import streaming


def evaluate_model(config: EvalConfig, *, on_event: Listener = silent) -> EvalResult:
    """Return loss and metric of ``config.model`` on one split of its task."""
    begin = time.perf_counter()
    on_event(Progress("loading", 0, 1))
    loaded = load(
        config.model, dtype=config.dtype, device=config.device, device_map=config.device_map, bound_kernels=True
    )
    prepared = encode_data(config, loaded, on_event, splits=(config.split,), demonstrations=config.demonstrations)
    split = prepared.dev if config.split == "dev" else prepared.test
    with streaming(loaded.model):
        warn_of_padding(loaded, prepared, on_event)
        scores = evaluate_split(loaded, prepared, split, config.batch_size, on_event, config.split)
    return EvalResult(
        model=config.model,
        task=prepared.task.name,
        split=config.split,
        eval_loss=scores.loss,
        metric=scores.metric,
        metric_name=scores.metric_name,
        examples=scores.examples,
        tokens=scores.tokens,
        seconds=time.perf_counter() - begin,
        peak_memory_bytes=peak_memory_bytes(loaded.model.device),
    )


def evaluate_split(
    loaded: Loaded,
    prepared: Prepared,
    encoded: Sequence[Encoded],
    batch_size: int,
    on_event: Listener,
    split: str,
    generating: bool = True,
) -> Evaluation:
    """Return the scores of ``loaded`` on ``encoded``, with progress as events; free heap goes back to the system.

    Raises:
        DivergedError: the loss is not finite, so that no metric means anything.
    """
    trimmer = Trimmer()

    def progress(done: int, total: int) -> None:
        trimmer.trim_if_due()
        on_event(Progress(f"evaluating {split}", done, total))

    scores = tasks.evaluate(
        loaded.model,
        loaded.tokenizer,
        prepared.task,
        encoded,
        batch_size=batch_size,
        generating=generating,
        progress=progress,
    )
    trim()
    if not math.isfinite(scores.loss):
        raise DivergedError(
            f"the loss on {split} is {scores.loss}: a weight, or what is computed from it, is not finite; try --dtype "
            "fp32, for a fine-tuned model a lower --lr, else download the model again"
        )
    return scores


def evaluate_written(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    config: FinetuneConfig,
    kept_step: int,
    on_event: Listener,
) -> tuple[Evaluation | None, Evaluation | None]:
    """Return dev and test scores of the checkpoint in ``folder``, loaded as ``zoft eval`` would load it.

    Only the test scores are an event: dev was scored after the step whose weights these are.
    """
    written = load(folder, device=config.device, tokenizer=tokenizer, device_map=config.device_map)
    found: list[Evaluation | None] = []
    for split, encoded in (("dev", prepared.dev), ("test", prepared.test)):
        if not encoded:
            found.append(None)
            continue
        scores = evaluate_split(written, prepared, encoded, config.eval_batch_size, on_event, split)
        if split == "test":
            on_event(Evaluated(kept_step, split, scores.loss, scores.metric, scores.metric_name, kept=True))
        found.append(scores)
    return found[0], found[1]
