"""The rows of a built-in task: from ``DIR/<name>/<split>.jsonl``, or sampled from the Hub as MeZO does."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zoft.errors import DataError
from zoft.tasks.files import Located, read
from zoft.tasks.types import HubSource, Split, Task

Sizes = Mapping[Split, int]


def folder_rows(task: Task, data: Path, splits: Sequence[Split], sizes: Sizes) -> dict[Split, list[Located]]:
    """Return the first ``sizes[split]`` rows of ``data/<task>/<split>.jsonl``, in file order.

    The first of ``splits`` is required; another that has no file is empty.
    """
    folder = data / task.name
    if not folder.is_dir():
        found = sorted(path.name for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
        raise DataError(f"no folder {folder}, expected {splits[0]}.jsonl in it; {data} has {_list(found)}")
    rows: dict[Split, list[Located]] = {}
    for split in splits:
        path = folder / f"{split}.jsonl"
        if path.exists() or split == splits[0]:
            rows[split] = list(itertools.islice(read(path), sizes[split]))
    return rows


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "no folders"


def hub_rows(task: Task, splits: Sequence[Split], sizes: Sizes, seed: int) -> dict[Split, list[Located]]:
    """Return rows sampled from the task's Hub data set (arXiv 2305.17333).

    A permutation of the training split by ``seed`` gives train and dev (its last rows); test is a sample of the
    public evaluation split, or follows dev where there is none. Where the training split is too small for both,
    dev keeps its size.
    """
    if task.hub is None:
        raise DataError(f"{task.name} is not on the Hub; give its rows with --data DIR ({task.name}/train.jsonl in it)")
    rows: dict[Split, list[Located]] = {}
    if "train" in splits or "dev" in splits or "test" not in task.hub.splits:
        rows = _cut(_permuted(_load(task.hub, "train"), seed), task, sizes)
    if "test" in splits and "test" in task.hub.splits:
        rows["test"] = _permuted(_load(task.hub, "test"), seed)[: sizes["test"]]
    return {split: rows[split] for split in splits}


def _cut(rows: list[Located], task: Task, sizes: Sizes) -> dict[Split, list[Located]]:
    both = min(sizes["train"] + sizes["dev"], len(rows))
    train = both - sizes["dev"]
    if train < 1:
        raise DataError(
            f"{task.name} has {len(rows)} training rows, too few for {sizes['dev']} dev rows; lower dev_size"
        )
    return {"train": rows[:train], "dev": rows[train:both], "test": rows[both : both + sizes["test"]]}


def _permuted(rows: Sequence[Any], seed: int) -> list[Any]:
    return [rows[i] for i in np.random.RandomState(seed % 2**32).permutation(len(rows))]


def _load(source: HubSource, split: str) -> list[Located]:
    # Imported here: `datasets` takes a second, and `--data` needs none of it.
    import datasets

    try:
        rows = datasets.load_dataset(
            source.id, source.config, revision=source.revision, split=source.splits[split], token=None
        )
    except (
        datasets.exceptions.DatasetsError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(
            f"cannot load {source.id} ({source.config or 'default'}, {source.splits[split]}) at revision "
            f"{source.revision}: {str(error).splitlines()[0]} Give its rows with --data DIR instead."
        ) from error
    place = f"{source.id} {source.splits[split]}"
    located = (Located(row, f"{place}, row {number}") for number, row in enumerate(rows))
    return [row for row in located if source.keep is None or source.keep(row.row)]
