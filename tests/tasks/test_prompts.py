"""Every built-in task's text, character by character (methods sheet, section 8)."""

import json

import pytest

from zoft.errors import ConfigError, DataError
from zoft.tasks import TASKS, get_task

RECORD_PASSAGE = "Bo Ryan met Ann Lee in Rome.\n@highlight\nThey talked.\n@highlight\nThey left."
RECORD = {
    "passage": RECORD_PASSAGE,
    "query": "Later @placeholder went home; @placeholder slept.",
    "entities": ["Rome", "Bo Ryan", "Ann Lee", "Rome"],
    "answers": ["Ann Lee", "Bo Ryan"],
}
RECORD_PROMPT = "Bo Ryan met Ann Lee in Rome.\n- They talked.\n- They left.\n-"
SQUAD = {"title": "Rome", "context": "It is old.", "question": " How old? ", "answers": {"text": ["Very old", "old"]}}
DROP = {"passage": "3 of 5 won.", "question": "How many?", "answers_spans": {"spans": ["3", "three"], "types": ["x"]}}
NLI = {"premise": "It rains.", "hypothesis": "It is wet"}
NLI_PROMPT = 'Suppose It rains. Can we infer that "It is wet"? Yes, No, or Maybe?\n'
WSC = {"text": "Bo saw Al as He ran.", "span1_text": "Bo", "span2_text": "He"}
WIC = {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank loan."}
MULTIRC = {"paragraph": "Al ran. ", "question": "Who ran?", "answer": "Al"}

CLASSIFICATION = [
    ("sst2", {"sentence": "a fine film . "}, "label", "a fine film . It was", (" terrible", " great")),
    ("vader_movie", {"sentence": "nice"}, "label", "nice It was", (" terrible", " great")),
    ("vader_mine", {"sentence": "nice"}, "label", "nice It was", (" terrible", " great")),
    (
        "rte",
        {"premise": "It rains.", "hypothesis": "It is wet."},
        "label",
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        ("Yes", "No"),
    ),
    ("cb", NLI, "label", NLI_PROMPT, ("Yes", "No", "Maybe")),
    ("snli", NLI, "label", NLI_PROMPT, ("Yes", "Maybe", "No")),
    ("mnli", NLI, "label", NLI_PROMPT, ("Yes", "Maybe", "No")),
    (
        "boolq",
        {"passage": "Fish swim.", "question": "do fish swim"},
        "label",
        "Fish swim. Do fish swim?\n",
        ("No", "Yes"),
    ),
    ("boolq", {"passage": "Fish swim.", "question": "Do they?"}, "label", "Fish swim. Do they?\n", ("No", "Yes")),
    (
        "wsc",
        WSC,
        "label",
        'Bo saw Al as He ran.\nIn the previous sentence, does the pronoun "he" refer to Bo? Yes or No?\n',
        ("No", "Yes"),
    ),
    (
        "wic",
        WIC,
        "label",
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA bank loan.\n',
        ("No", "Yes"),
    ),
    (
        "multirc",
        MULTIRC,
        "label",
        'Al ran. \nQuestion: Who ran?\nI found this answer "Al". Is that correct? Yes or No?\n',
        ("No", "Yes"),
    ),
    (
        "sst5",
        {"text": "a fine film ."},
        "label",
        "a fine film . It was",
        (" terrible", " bad", " okay", " good", " great"),
    ),
    (
        "trec",
        {"text": "Who won ?"},
        "coarse_label",
        "Who won ? The answer is about",
        (" an abbreviation", " an entity", " a description", " a person", " a place", " a number"),
    ),
]


@pytest.mark.parametrize(("name", "row", "label", "prompt", "words"), CLASSIFICATION)
def test_classification_prompt(name, row, label, prompt, words):
    for index in range(len(words)):
        example = get_task(name).example({**row, label: index})
        assert (example.prompt, example.choices, example.label) == (prompt, words, index)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"premise": "It rained.", "question": "effect"}, "It rained so the street got wet."),
        ({"premise": "It rained. ", "question": "cause"}, "It rained because the street got wet."),
        ({"premise": "Did it rain?", "question": "effect"}, "Did it rain? so the street got wet."),
    ],
)
def test_copa_prompt(row, text):
    example = get_task("copa").example({**row, "choice1": "I ran.", "choice2": "The street got wet.", "label": 1})
    assert example.full_text(1) == text
    assert example.choices == (" I ran.", " the street got wet.")
    assert example.label == 1


def test_boolq_reads_the_authors_field_too():
    """google/boolq has a truth value where SuperGLUE's copy has a label."""
    for answer in (False, True):
        example = get_task("boolq").example({"passage": "Fish swim.", "question": "do they", "answer": answer})
        assert (example.prompt, example.choices[example.label]) == ("Fish swim. Do they?\n", ["No", "Yes"][answer])


def test_record_ignores_answers_that_are_no_entities():
    example = get_task("record").example({**RECORD, "answers": ["Paris", "Rome", "Rome", "Ann Lee"]})
    assert (example.label, example.also_right) == (0, (2,))


def test_record_prompt_counts_every_listed_answer_and_trains_on_the_first():
    example = get_task("record").example(RECORD)
    assert example.prompt == RECORD_PROMPT
    assert example.choices == tuple(f" Later {who} went home; {who} slept." for who in ("Rome", "Bo Ryan", "Ann Lee"))
    assert (example.label, example.also_right) == (2, (1,))


@pytest.mark.parametrize(
    ("name", "row", "prompt", "target", "answers"),
    [
        (
            "squad",
            SQUAD,
            "Title: Rome\nContext: It is old.\nQuestion: How old?\nAnswer:",
            " Very old\n",
            ("Very old", "old"),
        ),
        ("drop", DROP, "Passage: 3 of 5 won.\nQuestion: How many?\nAnswer:", " 3\n", ("3", "three")),
        (
            "gsm8k",
            {"question": "9*2?", "answer": "9*2=<<9*2=18>>18\n#### 1,018"},
            "Question: 9*2?\nAnswer:",
            " 9*2=<<9*2=18>>18\n#### 1,018\n",
            ("1018",),
        ),
        (
            "metamathqa",
            {"query": "9*2?", "response": "It is 18.\nThe answer is: 18"},
            "Question: 9*2?\nAnswer:",
            " It is 18.\nThe answer is: 18\n",
            ("18",),
        ),
    ],
)
def test_generation_prompt(name, row, prompt, target, answers):
    example = get_task(name).example(row)
    assert (example.prompt, example.choices, example.answers) == (prompt, (target,), answers)


def test_every_task_is_covered_and_has_its_metric():
    metrics = {"squad": "f1", "drop": "f1", "gsm8k": "em", "metamathqa": "em"}
    assert {name: task.metric for name, task in TASKS.items()} == {n: metrics.get(n, "accuracy") for n in TASKS}
    assert {n for n, task in TASKS.items() if task.dev_size == 100} == {"cb", "copa", "wsc"}
    covered = {case[0] for case in CLASSIFICATION} | {"copa", "record", *metrics, "vader_tweets", "vader_amazon"}
    assert set(TASKS) <= covered


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sst2", {"text": "nice", "label": 1}, 'no field "sentence", found text, label'),
        ("sst2", {"sentence": "nice", "label": -1}, 'field "label" is -1, out of range: expected 0 to 1'),
        ("sst2", {"sentence": "nice", "label": "1"}, "field \"label\" is '1', expected a whole number from 0 to 1"),
        ("sst2", {"sentence": None, "label": 1}, 'field "sentence" is empty'),
        ("rte", {"premise": 3, "hypothesis": "x", "label": 1}, 'field "premise" is 3, expected text'),
        (
            "copa",
            {"premise": "x", "question": "why", "choice1": "a", "choice2": "b", "label": 0},
            '"cause" or "effect"',
        ),
        ("record", {**RECORD, "answers": ["Paris"]}, "'Paris'.*, none of which is among the entities"),
        ("boolq", {"passage": "x", "question": ""}, 'field "question" is blank'),
        ("boolq", {"passage": "x", "question": "y"}, 'no field "label"'),
        ("squad", {**SQUAD, "answers": {"text": []}}, 'field "answers.text" is \\[\\], expected a list of texts'),
        ("gsm8k", {"question": "x", "answer": "18"}, "names no answer"),
    ],
)
def test_bad_row_names_field_and_value(name, row, message):
    with pytest.raises(DataError, match=message):
        get_task(name).example(row)


def test_unknown_task_suggests_a_near_one():
    with pytest.raises(ConfigError, match="did you mean sst2"):
        get_task("SST-2")
    with pytest.raises(ConfigError, match="sst2, rte, cb"):
        get_task("zzz")


def test_real_rows_of_every_shared_data_set_make_examples(shared):
    sets = sorted(path.name for path in (shared / "data").iterdir() if path.is_dir())
    assert len(sets) == 15
    for name in sets:
        lines = (shared / "data" / name / "test.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            example = get_task(name).example(json.loads(line))
            assert example.prompt and all(example.choices)
            assert not example.prompt.endswith(" ")
