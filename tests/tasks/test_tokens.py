"""Token ids that a model does not know, and special tokens that rows bring themselves."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.tasks.conftest import make_task
from zoft.errors import DataError
from zoft.model.architecture import vocabulary
from zoft.tasks import evaluate, objective, prepare
from zoft.tasks.generate import generate

CHOICES = [
    {"prompt": "the film It was", "choices": [" great", " terrible and worse"], "label": 0},
    {"prompt": "It was", "choices": [" great", " terrible"], "label": 1},
]


@pytest.fixture
def copied(tokenizer):
    """A tokenizer that may be changed."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str()),
        **{name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token")},
    )


def write(folder, rows):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(folder, tokenizer, **options):
    return prepare(None, folder, tokenizer, **{"context_length": 64, "vocabulary": 320} | options)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("packed", [True, False])
def test_padding_beyond_the_embedding_is_another_token(family, packed, tiny_model, copied, tmp_path, monkeypatch):
    model = tiny_model(family)
    if not packed:
        monkeypatch.setattr("zoft.tasks.packing.PACKING", set())
    prepared = load(write(tmp_path, CHOICES), copied)
    expected = evaluate(model, copied, prepared.task, prepared.train, batch_size=4)
    loss = objective("loss", prepared.task, copied, batch_size=4)(model, prepared.train).value
    used = make_task("generation", scores={"f1": lambda *_: 0.0}, max_new_tokens=3)
    prompts = [(1, 5, 6), (1, 5)]
    texts = generate(model, copied, used, prompts)
    copied.add_special_tokens({"pad_token": "[PAD]"})
    assert copied.pad_token_id >= vocabulary(model) == 320
    assert evaluate(model, copied, prepared.task, prepared.train, batch_size=4) == expected
    assert objective("loss", prepared.task, copied, batch_size=4)(model, prepared.train).value == loss
    assert generate(model, copied, used, prompts) == texts


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "A zebrafish It was", "choices": [" great", " terrible"], "label": 0},
        {"prompt": "It was", "choices": [" great", " zebrafish"], "label": 0},
        {"prompt": "It was", "choices": [" great", " great zebrafish"], "label": 1},
    ],
    ids=["prompt", "choice", "end"],
)
def test_a_token_that_the_model_does_not_know_is_named(row, copied, tmp_path):
    copied.add_tokens(["zebrafish"])
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 3: the token \'zebrafish\' has id 320, and the model knows 320"
    ):
        load(write(tmp_path, [*CHOICES, row]), copied)
    assert len(load(write(tmp_path, CHOICES), copied).train) == 2  # a token that no row has does no harm


def test_one_start_and_one_end_token(tokenizer, copied, tmp_path):
    start = copied.backend_tokenizer
    from tokenizers import processors

    start.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    plain = [{"prompt": "It was", "completion": " great"}]
    brought = [
        {"prompt": "<bos>It was", "completion": " great<eos>"},
        {"prompt": "<bos><bos>It was", "completion": " great<eos>\n"},
        {"prompt": "It was", "completion": " great<eos><eos>"},
    ]
    (expected,) = load(write(tmp_path, plain), copied).train
    assert expected.prompt_ids[:1] == (1,) and expected.loss_rows[0].targets[0].tokens[-1] == 2
    prepared = load(write(tmp_path, brought), copied)
    for one in prepared.train:
        assert (one.rows, one.prompt_ids, one.example.answers) == (expected.rows, expected.prompt_ids, ("great",))
    assert prepared.warnings == (
        "2 rows bring the token '<bos>', which is added to every row: it is written once",
        "3 rows bring the token '<eos>', which is added to every row: it is written once",
    )
    (one,) = load(write(tmp_path, [{"text": "<bos>It was great"}]), copied).train
    assert one.rows == load(write(tmp_path, [{"text": "It was great"}]), copied).train[0].rows
    (one,) = load(write(tmp_path, [{"text": "It was<bos> great"}]), copied).train
    assert one.rows[0].ids.count(1) == 2  # inside a text it is the user's own


def test_one_start_and_one_end_token_of_a_masked_model(masked_tokenizer, tmp_path):
    row = {"prompt": "the film It was [MASK].", "choices": [" great", " terrible"], "label": 0}
    (expected,) = load(write(tmp_path, [row]), masked_tokenizer, masked=True).train
    brought = {**row, "prompt": f"<s>{row['prompt']}</s>"}
    prepared = load(write(tmp_path, [brought]), masked_tokenizer, masked=True)
    assert prepared.train[0].rows == expected.rows and len(prepared.warnings) == 2


def test_the_vocabulary_is_what_can_be_read_and_predicted(tiny_model):
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, 300)
    assert vocabulary(model) == 300
    assert vocabulary(torch.nn.Linear(2, 2)) > 2**31
