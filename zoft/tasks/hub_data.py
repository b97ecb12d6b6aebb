"""Data sets on the Hugging Face Hub: their ids and pinned revisions, and how rows are sampled from them.

Every data set loads without a script.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoft.errors import DataError
from zoft.tasks.rows import Located, Sizes
from zoft.tasks.types import HubSource, Split, Task

_VALIDATED = {"train": "train", "test": "validation"}
_TESTED = {"train": "train", "test": "test"}


def _glue(config: str, test: str = "validation") -> HubSource:
    return HubSource(
        "nyu-mll/glue", config, "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c", {"train": "train", "test": test}
    )


def _super_glue(config: str) -> HubSource:
    return HubSource("aps/super_glue", config, "3de24cf8022e94f4ee4b9d55a6f539891524d646", _VALIDATED)


SST2 = _glue("sst2")
MNLI = _glue("mnli", "validation_matched")
RTE = _super_glue("rte")
CB = _super_glue("cb")
COPA = _super_glue("copa")
WIC = _super_glue("wic")
WSC = _super_glue("wsc.fixed")
MULTIRC = _super_glue("multirc")
RECORD = _super_glue("record")
BOOLQ = HubSource("google/boolq", None, "35b264d03638db9f4ce671b711558bf7ff0f80d5", _VALIDATED)
SQUAD = HubSource("rajpurkar/squad", None, "7b6d24c440a36b6815f21b70d25016731768db1f", _VALIDATED)
DROP = HubSource("ucinlp/drop", None, "95cda593fae71b60b5b19f82de3fcf3298c1239c", _VALIDATED)
SST5 = HubSource("SetFit/sst5", None, "e51bdcd8cd3a30da231967c1a249ba59361279a3", _TESTED)
SNLI = HubSource("stanfordnlp/snli", None, "cdb5c3d5eed6ead6e5a341c8e56e669bb666725b", _TESTED, "label")
TREC = HubSource("CogComp/trec", None, "refs/convert/parquet", _TESTED)
GSM8K = HubSource("openai/gsm8k", "main", "e53f048856ff4f594e959d75785d2c2d37b678ee", _TESTED)
METAMATHQA = HubSource("meta-math/MetaMathQA", None, "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18", {"train": "train"})


def hub_rows(task: Task, splits: Sequence[Split], sizes: Sizes, seed: int) -> dict[Split, list[Located]]:
    """Return rows sampled from the task's Hub data set (arXiv 2305.17333).

    A permutation of the training split by ``seed`` gives train and dev (its last rows); test is a sample of the
    public evaluation split, or follows dev where there is none. If the training split is too small for both,
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
    """Yield every training row of the task's Hub data set lazily, in an order drawn by ``seed``."""
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
    """A split of a Hub data set and the indices of its labelled rows."""

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
    # Imported here: `datasets` takes a second to import, and `--data` does not need it.
    import datasets

    try:
        rows = datasets.load_dataset(source.id, source.config, revision=source.revision, split=source.splits[split])
    except Exception as error:  # of the libraries that read the many formats of the Hub
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load {source.id} ({source.config or 'default'}, {source.splits[split]}) at revision "
            f"{source.revision}: {reason} Give its rows with --data DIR instead."
        ) from error
    labels = rows[source.label] if source.label else [None] * len(rows)
    labelled = [i for i, label in enumerate(labels) if label != -1]
    return _HubSplit(f"{source.id} {source.splits[split]}", rows, labelled)
