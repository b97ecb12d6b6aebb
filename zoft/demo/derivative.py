"""Make a derivative of a base model, for which a tuner card is then looked up."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from zoft import tasks
from zoft.errors import Interrupted
from zoft.events import Listener, Progress
from zoft.model.load import load, save

LR = 1e-5
BATCH_SIZE = 8


def make_derivative(
    base: str, data: Path, folder: Path, *, steps: int, on_event: Listener, cancelled: Callable[[], bool]
) -> Path:
    """Fine-tune ``base`` on the train rows of ``data`` by ``steps`` of AdamW, write it to ``folder`` and return that.

    Its model card declares no base, as that of many checkpoints: only its weights identify it.
    """
    loaded = load(base, dtype="fp32", bound_kernels=True)
    prepared = tasks.prepare(
        None,
        data,
        loaded.tokenizer,
        context_length=loaded.context_length,
        masked=loaded.masked,
        splits=("train",),
    )
    loss = tasks.objective("loss", prepared.task, loaded.tokenizer, batch_size=1)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=LR, foreach=False)  # foreach would copy all weights
    for step in range(steps):
        indices = tasks.batch_indices(len(prepared.train), BATCH_SIZE, 0, step)
        optimizer.zero_grad()
        loss(loaded.model, [prepared.train[index] for index in indices]).value.backward()
        optimizer.step()
        on_event(Progress("making a derivative", step + 1, steps))
        if cancelled():
            raise Interrupted("stopped while a derivative was made")
    shutil.rmtree(folder, ignore_errors=True)
    card = "# A derivative\n\nMade by `zoft demo`: a few first-order steps on its sentences.\n"
    save(loaded.model, loaded.tokenizer, folder, dtype=loaded.stored_dtype, card=card)
    return folder
