"""A user's own files: what they may look like, and how each mistake is reported."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from zoft.errors import ConfigError, DataError
from zoft.tasks import prepare
from zoft.tasks.rows import split_of

CHOICES = [{"prompt": f"toy {i} It was", "choices": [" great", " terrible"], "label": i % 2} for i in range(60)]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture
def load(tokenizer):
    def run(path, **options):
        return prepare(None, path, tokenizer, **{"context_length": 128} | options)

    return run


@pytest.mark.parametrize("ending", WRITERS)
def test_one_file_is_split_by_the_content_of_its_rows(ending, tmp_path, load):
    prepared = load(WRITERS[ending](tmp_path / f"toys.{ending}", CHOICES))
    splits = {"train": prepared.train, "dev": prepared.dev, "test": prepared.test}
    seen = [one.example for split in splits.values() for one in split]
    assert len(seen) == len({example.prompt for example in seen}) == 60
    assert all(abs(len(splits[name]) - share) < 7 for name, share in (("train", 48), ("dev", 6), ("test", 6)))
    assert {(e.prompt, e.choices, e.label) for e in seen} == {
        (row["prompt"], tuple(row["choices"]), row["label"]) for row in CHOICES
    }
    assert (prepared.task.name, prepared.task.kind, prepared.task.metric) == ("toys", "classification", "accuracy")


def test_a_row_keeps_its_split_when_others_come_and_twins_share_one(tmp_path, load):
    few = load(write_jsonl(tmp_path / "few.jsonl", CHOICES[:30]))
    many = load(write_jsonl(tmp_path / "many.jsonl", CHOICES[::-1] + CHOICES))
    assert {one.example for one in few.train} <= {one.example for one in many.train}
    assert not {one.example for one in many.train} & {one.example for one in many.dev + many.test}
    assert split_of({"a": 1, "b": 2}) == split_of({"b": 2, "a": 1})


def test_a_folder_has_a_file_a_split_of_any_ending(tmp_path, load):
    write_jsonl(tmp_path / "train.jsonl", CHOICES[:5])
    write_csv(tmp_path / "dev.csv", CHOICES[5:8])
    prepared = load(tmp_path)
    assert [len(split) for split in (prepared.train, prepared.dev, prepared.test)] == [5, 3, 0]
    assert prepared.dev[0].example.prompt == "toy 5 It was"
    with pytest.raises(
        DataError, match=r"has no test file \(test.jsonl, test.csv, test.parquet\); found dev.csv, train"
    ):
        load(tmp_path, splits=("test",))
    write_csv(tmp_path / "train.csv", CHOICES[:5])
    with pytest.raises(DataError, match=r"has train.jsonl and train.csv; keep one"):
        load(tmp_path)


def test_rows_beyond_the_size_are_reported(tmp_path, load):
    write_jsonl(tmp_path / "train.jsonl", CHOICES)
    prepared = load(tmp_path, train_size=10)
    assert [one.example.prompt for one in prepared.train] == [row["prompt"] for row in CHOICES[:10]]
    assert prepared.warnings == ("only the first 10 train rows are used; raise train_size for more",)
    assert load(tmp_path, train_size=60).warnings == ()


def test_prompt_and_completion(tmp_path, load, tokenizer):
    rows = [{"prompt": "It was", "completion": " great"}, {"prompt": "It is", "completion": " terrible\n"}]
    prepared = load(write_jsonl(tmp_path / "train.jsonl", rows).parent)
    (row,) = prepared.train[0].loss_rows
    assert tokenizer.decode(list(row.targets[0].tokens)) == " great<eos>"
    assert prepared.train[1].example.answers == ("terrible",)
    assert (prepared.task.kind, prepared.task.metric, prepared.task.stop) == ("generation", "f1", "\n")
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"prompt": "List:", "completion": "a\nb"}])
    assert load(tmp_path).task.stop is None  # a newline is part of an answer here


def test_text(tmp_path, load):
    prepared = load(write_jsonl(tmp_path / "train.jsonl", [{"text": "Anna got a toy.", "id": 3}]).parent)
    assert (prepared.task.kind, prepared.task.metric) == ("text", "perplexity")
    assert prepared.train[0].example.full_text(0) == "Anna got a toy."


@pytest.mark.parametrize("ending", WRITERS)
def test_conversations_train_every_turn_of_the_assistant(ending, tmp_path, load, tokenizer, monkeypatch):
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "great"), ("user", "Bye"), ("assistant", "Yes, bye")]
    messages = [{"role": role, "content": content} for role, content in turns]
    WRITERS[ending](tmp_path / f"train.{ending}", [{"messages": messages}])
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    prepared = load(tmp_path)
    (row,) = prepared.train[0].loss_rows
    assert tokenizer.decode(list(row.ids)).startswith("<system>Be kind.</system>\n<user>Hi</user>\n<assistant>great<")
    assert tokenizer.decode(list(row.targets[0].tokens)) == "great</assistant>\nYes, bye</assistant>\n"
    assert all(row.ids[p + 1] == t for p, t in zip(row.targets[0].positions[:-1], row.targets[0].tokens, strict=False))


def test_a_long_conversation_keeps_its_last_turn(tmp_path, load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    turns = [{"role": "user", "content": "the plot was worse. " * 30}, {"role": "assistant", "content": "Yes"}]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": turns}])
    prepared = load(tmp_path, context_length=40)
    (row,) = prepared.train[0].loss_rows
    assert len(row.ids) == 39
    assert tokenizer.decode(list(row.targets[0].tokens)) == "Yes</assistant>\n"
    assert prepared.warnings == ("1 of 1 train rows are longer than 40 tokens: truncated",)


def test_a_real_chat_template_that_adds_a_system_turn(tmp_path, load, tokenizer, monkeypatch):
    """SmolLM2's template inserts a default system turn, so a turn's place cannot be found by adding up lengths."""
    template = (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nHelp<|im_end|>\n{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    write_jsonl(tmp_path / "train.jsonl", [{"messages": turns}])
    example = load(tmp_path).train[0].example
    assert [example.full_text(0)[start:stop] for start, stop in example.spans] == ["Yes<|im_end|>\n"]


GOOD = json.dumps(CHOICES[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"train.jsonl has no rows"),
        ("\n \n", r"train.jsonl has no rows"),
        (GOOD + "\n{", r"train.jsonl, line 2: not valid JSON \(Expecting property name .* at column 2\)"),
        ("[1]", r"line 1: list found, expected a JSON object"),
        (
            '{"question": "x"}',
            r"line 1: fields question, expected one of: messages; prompt \+ choices \+ label; prompt",
        ),
        (GOOD + '\n\n{"prompt": "x", "label": 0}', r'line 3: no field "choices", found prompt, label'),
        (
            '{"prompt": "x", "choices": ["a", "b"], "label": 2}',
            r'line 1: field "label" is 2, out of range: expected 0 to 1',
        ),
        ('{"prompt": "x", "choices": ["a", "b"], "label": true}', r'field "label" is True, expected a whole number'),
        ('{"prompt": "x", "choices": ["a", ""], "label": 0}', r'field "choices" is .*texts of length 1 or more'),
        ('{"prompt": "x", "choices": ["a", "a"], "label": 0}', r'field "choices" has the same text twice'),
        ('{"prompt": "x", "choices": "a|b", "label": 0}', r'field "choices" is not a list, nor JSON of one'),
        ('{"prompt": "", "completion": "a"}', r'field "prompt" is blank'),
        ('{"prompt": "x", "completion": null}', r'field "completion" is empty'),
        ('{"text": 3}', r'field "text" is 3, expected text'),
        ('{"text": "x"}', r'field "text" leaves no token to predict'),
        (
            '{"prompt": "x", "completion": "' + "great " * 200 + '"}',
            r'line 1: field "completion" has \d+ tokens, more than',
        ),
    ],
)
def test_each_mistake_names_file_line_and_field(content, message, tmp_path, load):
    (tmp_path / "train.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "is not a list"),
        ([], "is not a list"),
        ([{"role": "user"}], 'turn 1 has no "role" and "content"'),
        ([{"role": "user", "content": "x"}], "has no turn of the assistant"),
        ([{"role": "assistant", "content": "x"}], "starts with the assistant"),
    ],
)
def test_mistakes_in_conversations(messages, message, tmp_path, load, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    write_jsonl(tmp_path / "train.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=f'line 1: field "messages".*{message}'):
        load(tmp_path)


def test_messages_need_a_chat_template(tmp_path, load):
    write_jsonl(tmp_path / "train.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(DataError, match="this tokenizer has none"):
        load(tmp_path)


def test_unreadable_files(tmp_path, load, tokenizer):
    (tmp_path / "train.jsonl").write_bytes(GOOD.encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"train.jsonl, line 2: not UTF-8"):
        load(tmp_path)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(DataError, match=r"cannot read files of type .txt, expected .jsonl, .csv, .parquet"):
        load(tmp_path / "x.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        load(tmp_path / "absent.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a valid parquet file"):
        load(tmp_path / "bad.parquet")
    with pytest.raises(ConfigError, match="neither task nor data"):
        prepare(None, None, tokenizer, context_length=10)


def test_csv_mistakes_name_the_line_the_row_starts_at(tmp_path, load):
    path = tmp_path / "train.csv"
    path.write_text('prompt,completion\n"two\nlines",x\na,b,c\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"train.csv, line 4: not 2 columns"):
        load(tmp_path)
    path.write_text("prompt,completion\na\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"train.csv, line 2: not 2 columns"):
        load(tmp_path)
    path.write_text("prompt,completion\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no rows"):
        load(tmp_path)


def test_a_file_too_small_for_a_split(tmp_path, load):
    (row,) = [r for r in CHOICES if split_of(r) == "dev"][:1]
    with pytest.raises(DataError, match="the train split gets none"):
        load(write_jsonl(tmp_path / "one.jsonl", [row]))


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path, load):
    (tmp_path / "train.csv").write_text("\ufeffprompt,completion\nIt was, great\n", encoding="utf-8")
    assert load(tmp_path).train[0].example.full_text(0) == "It was great"
