"""The rows of a built-in task: from ``DIR/<name>/<split>.jsonl``, or sampled from the Hub as MeZO does."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        if not data.exists():
            raise DataError(f"no such folder: {data}; expected {task.name}/{splits[0]}.jsonl in it")
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
    hub = _source(task)
    own_test = "test" in hub.splits
    rows: dict[Split, list[Located]] = {}
    if set(splits) - ({"test"} if own_test else set()):
        source = _load(hub, "train")
        rows = {split: source.rows(part) for split, part in _cut(task, source.permuted(seed), sizes).items()}
    if "test" in splits and own_test:
        source = _load(hub, "test")
        rows["test"] = source.rows(source.permuted(seed)[: sizes["test"]])
    return {split: rows[split] for split in splits}


def hub_pool(task: Task, seed: int) -> Iterator[Located]:
    """Yield every training row of the task's Hub data set, in an order drawn by ``seed``, as they are asked for."""
    source = _load(_source(task), "train")
    return source.each(source.permuted(seed))


def _source(task: Task) -> HubSource:
    if task.hub is None:
        raise DataError(f"{task.name} is not on the Hub; give its rows with --data DIR ({task.name}/train.jsonl in it)")
    return task.hub


def _cut(task: Task, permuted: list[int], sizes: Sizes) -> dict[Split, list[int]]:
    both = min(sizes["train"] + sizes["dev"], len(permuted))
    train = both - sizes["dev"]
    if train < 1:
        raise DataError(
            f"{task.name} has {len(permuted)} training rows, too few for {sizes['dev']} dev rows; lower dev_size"
        )
    return {"train": permuted[:train], "dev": permuted[train:both], "test": permuted[both : both + sizes["test"]]}


@dataclass(frozen=True)
class _HubSplit:
    """A split of a Hub data set, and the indices of its labelled rows."""

    name: str
    table: Any
    labelled: Sequence[int]

    def permuted(self, seed: int) -> list[int]:
        order = np.random.RandomState(seed % 2**32).permutation(len(self.labelled))
        return [self.labelled[i] for i in order]

    def rows(self, indices: Sequence[int]) -> list[Located]:
        return list(self.each(indices))

    def each(self, indices: Sequence[int]) -> Iterator[Located]:
        for i, row in zip(indices, self.table.select(indices), strict=True):
            yield Located(row, f"{self.name}, row {i}")


def _load(source: HubSource, split: str) -> _HubSplit:
    # Imported here: `datasets` takes a second, and `--data` needs none of it.
    import datasets

    try:
        rows = datasets.load_dataset(source.id, source.config, revision=source.revision, split=source.splits[split])
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load {source.id} ({source.config or 'default'}, {source.splits[split]}) at revision "
            f"{source.revision}: {reason} Give its rows with --data DIR instead."
        ) from error
    labels = rows[source.label] if source.label else [None] * len(rows)
    labelled = [i for i, label in enumerate(labels) if label != -1]
    return _HubSplit(f"{source.id} {source.splits[split]}", rows, labelled)
