"""The end of a run: the kept weights are written, and scored as written."""

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from zoft.deploy.config import FinetuneConfig
from zoft.deploy.evaluate import score
from zoft.events import Evaluated, Listener, Progress
from zoft.model.load import Loaded, load, save
from zoft.tasks import Evaluation, Prepared


def write_model(loaded: Loaded, folder: Path, card: str, on_event: Listener) -> None:
    """Write the present weights to ``folder`` in the base's dtype; ``card`` is its README."""
    on_event(Progress("saving", 0, 1))
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed right here
    save(loaded.model, loaded.tokenizer, folder, dtype=loaded.stored_dtype, card=card)


def score_written(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    config: FinetuneConfig,
    kept_step: int,
    on_event: Listener,
) -> tuple[Evaluation | None, Evaluation | None]:
    """Return dev and test scores of the checkpoint in ``folder`` as ``zoft eval`` would load it.

    Only those on test are told as an event: dev was scored when the step was taken.
    """
    written = load(folder, device=config.device, tokenizer=tokenizer, device_map=config.device_map)
    found: list[Evaluation | None] = []
    for split, encoded in (("dev", prepared.dev), ("test", prepared.test)):
        if not encoded:
            found.append(None)
            continue
        scores = score(written, prepared, encoded, config.eval_batch_size, on_event, split)
        if split == "test":
            on_event(Evaluated(kept_step, split, scores.loss, scores.metric, scores.metric_name, kept=True))
        found.append(scores)
    return found[0], found[1]
