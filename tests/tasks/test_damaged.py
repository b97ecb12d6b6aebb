"""Data files that are damaged, or written by other programs: one message with file, line and field, no traceback."""

import datetime
import json
import random
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tests.tasks.test_own_task import CHOICES, write_parquet
from zoft.errors import DataError
from zoft.tasks import prepare

GOOD = json.dumps(CHOICES[0])
TEXT = "\ud83d"  # half an emoji


@pytest.fixture
def load(tokenizer):
    def run(path, **options):
        return prepare(None, path, tokenizer, **{"context_length": 128} | options)

    return run


def row(**fields):
    return json.dumps({**CHOICES[0], **fields})


@pytest.mark.parametrize("alone", [True, False], ids=["file", "folder"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(prompt=f"A face {TEXT}. It was"), r'line 2: field "prompt" holds half a character \(\\ud83d, .* place 8'),
        (row(choices=[" a", f" {TEXT}"]), r'line 2: field "choices" holds half a character'),
        (row(label=TEXT), r'line 2: field "label" is .* expected a whole number'),
        (row(label=float("nan")), r'line 2: field "label" is nan, expected a whole number'),
        (row(label=float("inf")), r'line 2: field "label" is inf, expected a whole number'),
        (row(label=0.5), r'line 2: field "label" is 0.5, expected a whole number'),
        (row(label="1e0"), r"line 2: field \"label\" is '1e0', expected a whole number"),
        (row(label=[1]), r'line 2: field "label" is \[1\]'),
        (row(label=2.0), r'line 2: field "label" is 2, out of range'),
        (row(prompt=float("nan")), r'line 2: field "prompt" is nan, expected text'),
        (row(choices="[" * 100_000), r'line 2: field "choices" is not a list, nor JSON'),
        ("[" * 100_000, r"line 2: not valid JSON"),
        ('{"label": ' + "1" * 5000 + "}", r"line 2: not valid JSON"),
        ('{"label": 0, "label": 1}', r'line 2: not valid JSON \("label" twice\)'),
        ("\x00", r"line 2: not valid JSON"),
        ("nul", r"line 2: not valid JSON"),
        ('"text"', r"line 2: str found, expected a JSON object"),
        ("{}", r'line 2: (no field "choices"|fields none, expected one of)'),
    ],
)
def test_rows_of_jsonl(alone, line, message, tmp_path, load):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([GOOD, line, *(json.dumps(one) for one in CHOICES)]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="train.jsonl, " + message):
        load(path if alone else tmp_path, train_size=60, dev_size=60, test_size=60)


@pytest.mark.parametrize(
    "row",
    [
        {"text": f"x{TEXT}y It was"},
        {"prompt": "It was", "completion": f" {TEXT}"},
        {"messages": [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "Yes"}]},
    ],
    ids=["text", "completion", "messages"],
)
def test_half_an_emoji_in_every_kind_of_row(row, tmp_path, load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        DataError, match=r'train.jsonl, line 1: field "(text|completion|messages)" holds half a character'
    ):
        load(tmp_path)


def test_half_an_emoji_of_the_chat_template(tmp_path, load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ '\\ud83d' }}{% for m in messages %}{{ m.content }}{% endfor %}")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="line 1: the tokenizer refuses the text"):
        load(tmp_path)


def test_half_an_emoji_in_a_built_in_task(tmp_path, tokenizer):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.jsonl").write_text(json.dumps({"sentence": TEXT, "label": 0}) + "\n")
    with pytest.raises(DataError, match=r'line 1: field "sentence" holds half a character'):
        prepare("sst2", tmp_path, tokenizer, context_length=64)


@pytest.mark.parametrize("label", ["1", "1.0", " 1 ", "1.", "+1"])
def test_labels_of_csv_as_pandas_writes_them(label, tmp_path, load):
    path = tmp_path / "train.csv"
    path.write_text(f'prompt,choices,label\nIt was,"["" good"","" bad""]",{label}\n')
    assert load(tmp_path).train[0].label == 1
    write_parquet(tmp_path / "dev.parquet", [{"prompt": "It was", "choices": [" good", " bad"], "label": 1.0}])
    assert load(tmp_path).dev[0].label == 1


@pytest.mark.parametrize("label", ["", "nan", "one", "1.5", "2.0", "-1.0", "1e5", "1_0", "\u0661", "9" * 30])
def test_labels_of_csv_that_are_none(label, tmp_path, load):
    (tmp_path / "train.csv").write_text(
        f'prompt,choices,label\nIt was,"["" good"","" bad""]",{label}\n', encoding="utf-8"
    )
    with pytest.raises(DataError, match=r'train.csv, line 2: field "label" is'):
        load(tmp_path)


def test_a_field_of_csv_may_be_long(tmp_path, load):
    (tmp_path / "train.csv").write_text("prompt,completion\n" + "great " * 30_000 + ",x\n")
    prepared = load(tmp_path)
    assert prepared.warnings == ("1 of 1 train rows are longer than 128 tokens: truncated",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"prompt,prompt\na,b\n", "line 1: two columns have the same name"),
        ("train.csv", b"prompt,completion\r\na,b\rc,d\r\n", "not valid csv"),
        ("train.csv", b'prompt,completion\n"a,b\n', "not valid csv"),
        ("train.csv", b"prompt,completion\n\xff,b\n", "line 2: not UTF-8"),
        ("train.csv", "prompt,completion\na,b\n".encode("utf-16"), "line 1: not UTF-8"),
        ("train.csv", b"", "has no rows"),
        ("train.csv", b"\n\n", "has no rows"),
        ("train.csv", b"\x00\x00\x00", "train.csv"),
        ("train.jsonl", (GOOD + "\n").encode("utf-16"), "line 1: not UTF-8"),
        ("train.jsonl", (GOOD + "\n").encode("utf-16-le"), "line 1: not valid JSON"),
        ("train.jsonl", (GOOD + "\n").encode("utf-32"), "line 1: not UTF-8"),
        ("train.jsonl", '{"text": "caf\xe9"}\n'.encode("cp1252"), "line 1: not UTF-8"),
        ("train.jsonl", b"\x1f\x8b\x08\x00 zipped", "line 1: not UTF-8"),
        ("train.jsonl", b"", "has no rows"),
        ("train.jsonl", (GOOD + GOOD).encode(), "line 1: not valid JSON"),
        ("train.parquet", b"", "not a valid parquet file"),
        ("train.parquet", b"PAR1", "not a valid parquet file"),
        ("train.parquet", b"PAR1" + b"\x00" * 40 + b"PAR1", "not a valid parquet file"),
        ("train.parquet", GOOD.encode(), "not a valid parquet file"),
    ],
)
def test_files_of_another_kind_or_encoding(name, content, message, tmp_path, load):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_parquet_with_bytes_flipped_or_cut(tmp_path, load):
    """Whatever is damaged: rows, a `DataError` that names the file, or rows that are refused by field; 150 files."""
    whole = write_parquet(tmp_path / "whole.parquet", CHOICES).read_bytes()
    draw = random.Random(0)
    for number in range(150):
        damaged = bytearray(whole)
        if number % 3 == 0:
            damaged = damaged[: draw.randrange(len(whole))]
        else:
            for _ in range(draw.choice([1, 4, 32])):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "train.parquet").write_bytes(damaged)
        try:
            load(tmp_path, splits=("train",))
        except DataError as error:
            assert "train.parquet" in str(error)


def test_parquet_with_columns_of_other_types(tmp_path, load):
    now = datetime.datetime.now()
    for value in (3, 2.5, None, True, now, now.date(), [1], {"a": 1}, b"\xff\xfe", b"text", 10**18):
        rows = [{"prompt": value, "choices": [" good", " bad"], "label": 0}]
        path = write_parquet(tmp_path / "train.parquet", rows)
        with pytest.raises(DataError, match=r'train.parquet, row 1: field "prompt" is'):
            load(tmp_path)
        path.rename(tmp_path / "alone.parquet")
        with pytest.raises(DataError, match=r"alone.parquet"):
            load(tmp_path / "alone.parquet")
    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet"):
        load(tmp_path)


@pytest.mark.parametrize("more", [{"label": 1}, {"labels": 1}, {"choices": ["a", "b"]}, {"completion": "x"}])
def test_a_text_with_a_label_is_refused(more, tmp_path, load):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "It was great", **more}) + "\n")
    with pytest.raises(DataError, match=rf"line 1: fields text and {next(iter(more))}: .* leave out all but text"):
        load(tmp_path)


def test_fields_of_another_kind_of_row_are_reported(tmp_path, load):
    (tmp_path / "train.jsonl").write_text(row(completion=" great", text="x", id=3) + "\n")
    prepared = load(tmp_path)
    (warning,) = prepared.warnings
    assert prepared.task.kind == "classification" and warning.endswith("not read: completion, text")


def test_the_limit_of_csv_is_that_of_no_field():
    import csv

    assert csv.field_size_limit() >= min(2**31 - 1, sys.maxsize)
