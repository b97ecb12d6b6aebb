import json
import re
from collections import Counter

import pytest

from zoft.demo import rows as data
from zoft.demo.rows import TOPIC, VERDICT

TASKS = pytest.mark.parametrize("task", [VERDICT, TOPIC], ids=lambda task: task.name)


@TASKS
def test_no_sentence_is_in_two_splits_or_twice(task):
    prompts = [row["prompt"] for rows in task.rows().values() for row in rows]
    assert len(prompts) == 408 + 72 + 96
    assert len(set(prompts)) == len(prompts)


@TASKS
def test_labels_and_templates_are_balanced_in_every_split(task):
    words = {word for mapping in task.words for choices in mapping.values() for word in choices}
    blank = re.compile(r"\b(" + "|".join(sorted(words, key=len, reverse=True)) + r")\b")
    kinds_expected = len(task.choices) * len(task.templates)
    for split, rows in task.rows().items():
        kinds = Counter((blank.sub("_", row["prompt"]), row["label"]) for row in rows)
        assert len(kinds) == kinds_expected
        assert set(kinds.values()) == {data.SIZES[split] // kinds_expected}


def test_labels_are_those_of_the_verdict():
    """The word that holds the verdict is the last of the sentence's, but for negations, where it is its opposite."""
    verdict = re.compile(r"\b(" + "|".join(data.GOOD + data.BAD) + r")\b")
    for row in VERDICT.rows()["train"]:
        good = verdict.findall(row["prompt"])[-1] in data.GOOD
        negated = re.match(r"Nobody could|There was nothing|.*far from", row["prompt"]) is not None
        assert row["label"] == int(good != negated), row


def test_the_topic_is_that_of_the_nouns():
    for row in TOPIC.rows()["train"]:
        found = [label for label, nouns in enumerate(data.NOUNS) if any(f" {noun}" in row["prompt"] for noun in nouns)]
        assert found == [row["label"]], row


def test_the_tasks_share_no_sentence_and_no_answer():
    assert not set(VERDICT.choices) & set(TOPIC.choices)
    assert not set(VERDICT.templates) & set(TOPIC.templates)


def test_the_data_is_the_same_everywhere(tmp_path):
    folder = VERDICT.write(tmp_path / "data")
    first = json.loads((folder / "dev.jsonl").read_text().splitlines()[0])
    assert first == {
        "prompt": "I found the lecture lovely, and so did my family. It was",
        "choices": [" terrible", " great"],
        "label": 1,
    }
    assert {file.name for file in folder.iterdir()} == {"train.jsonl", "dev.jsonl", "test.jsonl"}
