"""Rows of the built-in tasks: from folders, and from stand-ins for the Hub on disk."""

from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.tasks.test_own_task import write_jsonl
from zoft.errors import DataError
from zoft.tasks import builtin, prepare
from zoft.tasks import hub_data as hub
from zoft.tasks.types import HubSource

ROWS = [{"sentence": f"toy {i}", "label": i % 2, "idx": i} for i in range(40)]


@pytest.fixture
def load(tokenizer):
    def run(task, data=None, **options):
        return prepare(task, data, tokenizer, **{"context_length": 64} | options)

    return run


def number(one):
    return int(one.example.prompt.split()[1])


@pytest.fixture
def on_disk(tmp_path, monkeypatch):
    """Put a data set in the Hub's layout on disk, and let sst2 come from there."""

    def use(splits, rows, label=None):
        folder = tmp_path / "copy"
        folder.mkdir()
        for name in splits.values():
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet")
        source = HubSource(str(folder), None, "main", splits, label)
        monkeypatch.setitem(builtin.TASKS, "sst2", replace(builtin.TASKS["sst2"], hub=source))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")

    return use


def test_a_folder_is_read_in_file_order_up_to_the_sizes(tmp_path, load):
    (tmp_path / "sst2").mkdir()
    for split, rows in (("train", ROWS[:30]), ("dev", ROWS[30:])):
        write_jsonl(tmp_path / "sst2" / f"{split}.jsonl", rows)
    prepared = load("sst2", tmp_path, train_size=20, dev_size=4)
    assert [number(one) for one in prepared.train] == list(range(20))
    assert [number(one) for one in prepared.dev] == [30, 31, 32, 33]
    assert prepared.test == ()


def test_a_data_folder_that_is_not_there(tmp_path, load):
    with pytest.raises(DataError, match=r"no such folder: .*nowhere; expected copa/dev.jsonl in it"):
        load("copa", tmp_path / "nowhere", splits=("dev",))


def test_a_missing_split_or_task_folder_lists_what_there_is(tmp_path, load):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "rte").mkdir()
    with pytest.raises(DataError, match=r"cannot read .*sst2/train.jsonl: No such file"):
        load("sst2", tmp_path)
    with pytest.raises(DataError, match=r"no folder .*copa, expected dev.jsonl in it; .* has rte, sst2"):
        load("copa", tmp_path, splits=("dev",))


def test_a_bad_row_names_file_line_and_field(tmp_path, load):
    (tmp_path / "sst2").mkdir()
    write_jsonl(tmp_path / "sst2" / "train.jsonl", [*ROWS[:2], {"sentence": "x", "label": 7}])
    with pytest.raises(DataError, match=r'sst2/train.jsonl, line 3: field "label" is 7, out of range: expected 0 to 1'):
        load("sst2", tmp_path)


def test_hub_rows_are_sampled_as_mezo_samples(on_disk, load):
    on_disk({"train": "train", "test": "validation"}, ROWS)
    prepared = load("sst2", train_size=20, dev_size=10, test_size=15, seed=3)
    order = np.random.RandomState(3).permutation(40).tolist()
    assert [number(one) for one in prepared.train] == order[:20]
    assert [number(one) for one in prepared.dev] == order[20:30]
    assert [number(one) for one in prepared.test] == order[:15]
    only = load("sst2", splits=("dev",), train_size=20, dev_size=10, seed=3)
    assert only.dev == prepared.dev and only.train == ()


def test_a_small_training_split_gives_dev_first(on_disk, load):
    on_disk({"train": "train", "test": "validation"}, ROWS)
    prepared = load("sst2", train_size=1000, dev_size=10)
    assert (len(prepared.train), len(prepared.dev), len(prepared.test)) == (30, 10, 40)
    with pytest.raises(DataError, match="40 training rows, too few for 40 dev rows; lower dev_size"):
        load("sst2", dev_size=40)


def test_without_a_test_split_test_follows_dev(on_disk, load):
    on_disk({"train": "train"}, ROWS)
    prepared = load("sst2", train_size=20, dev_size=10, test_size=100)
    numbers = [number(one) for split in (prepared.train, prepared.dev, prepared.test) for one in split]
    assert sorted(numbers) == list(range(40)) and len(prepared.test) == 10


def test_rows_without_a_gold_label_are_left_out(on_disk, load):
    on_disk({"train": "train", "test": "test"}, [*ROWS, {"sentence": "toy 99", "label": -1, "idx": 99}], label="label")
    prepared = load("sst2", train_size=30, dev_size=10)
    assert sorted(number(one) for one in prepared.train + prepared.dev) == list(range(40))


def test_a_hub_row_s_error_names_data_set_and_row(on_disk, load):
    on_disk({"train": "train", "test": "test"}, [{"sentence": "x", "label": -1}] * 9)
    with pytest.raises(DataError, match=r'copy train, row \d: field "label" is -1'):
        load("sst2", train_size=5, dev_size=2)


def test_an_unreachable_data_set_names_id_revision_and_the_way_round(load, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        DataError, match=rf"cannot load aps/super_glue \(rte, train\) at revision {hub.RTE.revision}: .*--data"
    ):
        load("rte")


def test_vader_needs_a_folder(load):
    with pytest.raises(DataError, match="vader_mine is not on the Hub; give its rows with --data DIR"):
        load("vader_mine")


def test_every_revision_is_pinned():
    sources = [source for source in vars(hub).values() if isinstance(source, HubSource)]
    assert len(sources) == 17
    branches = {source.id for source in sources if len(source.revision) != 40}
    assert branches == {"CogComp/trec"}  # its script-free copy is a branch the Hub converts


def test_all_shared_data_sets_prepare(shared, load):
    for folder in sorted((shared / "data").iterdir()):
        if folder.is_dir():
            prepared = load(folder.name, shared / "data", train_size=8, dev_size=4, test_size=4, context_length=2048)
            assert [len(s) for s in (prepared.train, prepared.dev, prepared.test)] == [8, 4, 4]
