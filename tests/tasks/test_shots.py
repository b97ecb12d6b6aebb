"""K rows of every class for train and dev: counts, disjointness, determinism, what is said where rows are missing."""

import json
from collections import Counter

import numpy as np
import pytest

from tests.tasks.test_rows import on_disk  # noqa: F401
from zoft import tasks
from zoft.errors import ConfigError, DataError

ROWS = [{"sentence": f"toy {i} .", "label": int(i % 3 > 0)} for i in range(60)]  # 20 of label 0, 40 of label 1


@pytest.fixture
def folder(tmp_path):
    """``folder(train, **splits)``: rows of sst2 in a data folder."""

    def make(train=ROWS, **splits):
        (tmp_path / "sst2").mkdir(exist_ok=True)
        for split, rows in {"train": train, **splits}.items():
            (tmp_path / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return make


@pytest.fixture
def prepare(tokenizer):
    def run(data, shots, task="sst2", **options):
        return tasks.prepare(task, data, tokenizer, context_length=64, shots=shots, **options)

    return run


def labels(split):
    return Counter(one.label for one in split)


def prompts(*splits):
    return [one.example.prompt for split in splits for one in split]


def test_train_and_dev_have_so_many_rows_of_every_class_and_share_none(folder, prepare):
    prepared = prepare(folder(test=ROWS[:5]), 10)
    assert labels(prepared.train) == labels(prepared.dev) == {0: 10, 1: 10}
    assert len(set(prompts(prepared.train, prepared.dev))) == 40
    assert len(prepared.test) == 5 and not prepared.warnings


def test_rows_are_the_first_of_every_class_in_a_permutation_as_lm_bff_takes_them(folder, prepare):
    prepared = prepare(folder(), 3, seed=42)
    order = np.random.RandomState(42).permutation(60)
    for label in (0, 1):
        drawn = [f"toy {i} . It was" for i in order if ROWS[i]["label"] == label]
        for split, expected in ((prepared.train, drawn[:3]), (prepared.dev, drawn[3:6])):
            assert [one.example.prompt for one in split if one.label == label] == expected


def test_the_seed_decides(folder, prepare):
    data = folder()
    assert prepare(data, 5, seed=1) == prepare(data, 5, seed=1)
    assert prompts(prepare(data, 5, seed=1).train) != prompts(prepare(data, 5, seed=2).train)


def test_sizes_and_a_dev_file_count_for_nothing(folder, prepare):
    plain = prepare(folder(), 10)
    assert prepare(folder(dev=ROWS[:4]), 10, train_size=3, dev_size=2) == plain


def test_dev_alone_is_the_dev_of_the_run_and_test_needs_no_train(folder, prepare):
    data = folder(test=ROWS[:7])
    run = prepare(data, 4, seed=9)
    asked = prepare(data, 4, seed=9, splits=("dev",))
    assert asked.dev == run.dev and asked.train == ()
    (data / "sst2" / "train.jsonl").unlink()
    assert prepare(data, 4, seed=9, splits=("test",)).test == run.test


def test_a_class_with_too_few_rows_gives_to_train_first_and_is_reported(folder, prepare):
    prepared = prepare(folder(), 16)
    assert labels(prepared.train) == {0: 16, 1: 16} and labels(prepared.dev) == {0: 4, 1: 16}
    assert prepared.warnings == (
        "too few training rows of some classes for 16 of train and 16 of dev each (label 0: 20)",
    )


def test_what_cannot_be_drawn_is_an_error(folder, prepare):
    with pytest.raises(DataError, match=r"largest class has 40 training rows, all of them .*lower --shots"):
        prepare(folder(), 40)
    with pytest.raises(DataError, match="no training row has label 0; expected 2 rows of every class"):
        prepare(folder([row for row in ROWS if row["label"]]), 2)
    with pytest.raises(DataError, match=r"train.jsonl, line 2: field \"label\" is 7"):
        prepare(folder([ROWS[0], {"sentence": "a", "label": 7}]), 2)
    copa = folder().parent / "more"
    (copa / "copa").mkdir(parents=True)
    row = {"premise": "a.", "question": "cause", "choice1": "b", "choice2": "c", "label": 0}
    (copa / "copa" / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=r"copa \(choice\) has no classes to take 2 rows of"):
        prepare(copa, 2, task="copa")


def test_own_rows_have_the_classes_of_their_labels(tmp_path, prepare):
    rows = [{"prompt": f"row {i} is", "choices": [" a", " b", " c"], "label": i % 3} for i in range(30)]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(tmp_path / "own", 4, task=None)
    assert labels(prepared.train) == labels(prepared.dev) == {0: 4, 1: 4, 2: 4}


def test_demonstrations_come_from_the_shots(folder, prepare):
    shown = prepare(folder(test=ROWS[:1]), 2, splits=("test",), demonstrations=4).test[0].example.prompt
    train = prompts(prepare(folder(), 2).train)
    assert sum(shown.count(prompt + " ") for prompt in train) == 4


def test_from_the_hub_too(on_disk, prepare):  # noqa: F811
    on_disk({"train": "train", "test": "validation"}, ROWS)
    prepared = prepare(None, 5, seed=3)
    assert labels(prepared.train) == labels(prepared.dev) == {0: 5, 1: 5}
    assert len(prepared.test) == 60
    order = [f"toy {i} . It was" for i in np.random.RandomState(3).permutation(60) if not ROWS[i]["label"]]
    assert [one.example.prompt for one in prepared.train if not one.label] == order[:5]


@pytest.mark.parametrize(("name", "shots"), [("sst2", 16), ("trec", 4), ("mnli", 16)])
def test_real_rows(shared, prepare, name, shots):
    prepared = prepare(shared / "data", shots, task=name, splits=("train", "dev"))
    classes = len(prepared.task.words)
    assert labels(prepared.train) == labels(prepared.dev) == dict.fromkeys(range(classes), shots)
