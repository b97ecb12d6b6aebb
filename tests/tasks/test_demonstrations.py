"""In-context learning: what stands before the question, where the choices begin, what does not fit."""

import json
from pathlib import Path

import pytest

from zoft.errors import DataError
from zoft.tasks import prepare

ROWS = [{"prompt": f"the film {i} was fine. It was", "choices": [" bad", " good"], "label": i % 2} for i in range(6)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, rows in (("train", ROWS[:4]), ("dev", ROWS[4:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def dev(data: Path, tokenizer, count: int, seed: int = 0, context: int = 2000):
    return prepare(None, data, tokenizer, context_length=context, splits=("dev",), seed=seed, demonstrations=count)


def test_solved_rows_stand_before_the_question(data, tokenizer):
    prepared = dev(data, tokenizer, 4)
    assert prepared.train == () and len(prepared.dev) == 2
    *solved, asked = prepared.dev[0].example.prompt.split("\n\n")
    assert sorted(solved) == sorted(row["prompt"] + row["choices"][row["label"]] for row in ROWS[:4])
    assert asked == ROWS[4]["prompt"]
    other = dev(data, tokenizer, 4, seed=1).dev[0].example.prompt
    assert other != prepared.dev[0].example.prompt and sorted(other) == sorted(prepared.dev[0].example.prompt)


def test_the_choices_are_scored_where_they_were(data, tokenizer):
    plain, shown = dev(data, tokenizer, 0), dev(data, tokenizer, 2)
    for one, two in zip(plain.dev, shown.dev, strict=True):
        targets = [[[target.tokens for target in row.targets] for row in encoded.rows] for encoded in (one, two)]
        assert targets[0] == targets[1]
        for short, long in zip(one.rows, two.rows, strict=True):
            assert long.ids[-len(short.ids) :] == short.ids and len(long.ids) > len(short.ids)


def test_what_does_not_fit_is_cut_from_the_left(data, tokenizer):
    whole, cut = dev(data, tokenizer, 4), dev(data, tokenizer, 4, context=60)
    (row, *_), (short, *_) = whole.dev[0].rows, cut.dev[0].rows
    assert len(short.ids) <= 60 < len(row.ids) and row.ids[-len(short.ids) :] == short.ids
    assert any("truncated" in warning for warning in cut.warnings)


def test_too_few_rows_and_plain_texts_are_refused(data, tokenizer, tmp_path):
    with pytest.raises(DataError, match="5 demonstrations from 4 training rows"):
        dev(data, tokenizer, 5)
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "dev"):
        (texts / f"{split}.jsonl").write_text('{"text": "Once upon a time."}\n')
    with pytest.raises(DataError, match="plain text"):
        dev(texts, tokenizer, 1)
