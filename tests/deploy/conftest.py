"""A task that stories260K learns in seconds, a run on it, and ways to compare runs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zoft.deploy import Event, FinetuneConfig, FinetuneResult, StepDone, finetune
from zoft.errors import Interrupted

TOYS = ["red ball", "blue kite", "new doll", "big car", "little drum", "toy boat", "soft bear", "green top"]
NAMES = ["Lily", "Tom", "Sue", "Ben", "Mia", "Max", "Anna", "Sam"]


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A two-class cloze that stories260K can learn: who gets a toy is happy, who loses one is sad."""
    folder = tmp_path / "toys"
    folder.mkdir()
    rows = [
        {"prompt": f"{name} {verb} a {toy}. {name} was", "choices": [" happy", " sad"], "label": label}
        for name in NAMES
        for toy in TOYS
        for verb, label in (("got", 0), ("lost", 1))
    ]
    rows.sort(key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    for split, part in (("train", rows[:64]), ("dev", rows[64:96]), ("test", rows[96:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def config(stories260k: Path, toys: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(stories260k), data=toys, steps=12, lr=1e-4, batch_size=16, eval_every=4, out=tmp_path / "run"
    )


def with_(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({**config.model_dump(), **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_times(result: FinetuneResult) -> dict[str, Any]:
    return result.model_dump(exclude={"seconds", "peak_memory_bytes", "out", "journal"})


def stopped_at(config: FinetuneConfig, stop: int, **options: Any) -> None:
    """Take steps up to ``stop`` and be interrupted there."""
    taken: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            taken.append(event.step)

    with pytest.raises(Interrupted, match=r"--resume"):
        finetune(config, on_event=listen, cancelled=lambda: bool(taken) and taken[-1] >= stop, **options)
