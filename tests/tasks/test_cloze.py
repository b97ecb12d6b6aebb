"""Masked language models: prompts character by character, and scores against plain forward passes of one row."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from tests.conftest import MASKED
from zoft import tasks
from zoft.errors import ConfigError, DataError, ModelError
from zoft.model.architecture import context_length, is_masked, position_start
from zoft.tasks import get_task
from zoft.tasks.cloze import ClozeEncoder, cloze_task, own_cloze_task
from zoft.tasks.losses import choice_sums
from zoft.tasks.types import Example

TEXTS = ("the film was great. It was", "it. It was", "Anna got a new toy because she liked it. It was")
NLI = {"premise": "It rains.", "hypothesis": "It is wet"}
PROMPTS = [
    ("sst2", {"sentence": "a fine film . "}, "label", "a fine film . It was[MASK].", (" terrible", " great")),
    ("vader_tweets", {"sentence": "nice"}, "label", "nice It was[MASK].", (" terrible", " great")),
    ("vader_mine", {"sentence": "nice"}, "label", "nice It was[MASK].", (" terrible", " great")),
    ("sst5", {"text": " so so ."}, "label", "so so . It was[MASK].", (" terrible", " bad", " okay", " good", " great")),
    ("snli", NLI, "label", "It rains.?[MASK], It is wet", (" Yes", " Maybe", " No")),
    ("mnli", NLI, "label", "It rains.?[MASK], It is wet", (" Yes", " Maybe", " No")),
    ("rte", NLI, "label", "It rains.?[MASK], It is wet", (" Yes", " No")),
    (
        "trec",
        {"text": "Who won {it} ? "},
        "coarse_label",
        "[MASK]: Who won {it} ?",
        (" Expression", " Entity", " Description", " Human", " Location", " Number"),
    ),
]


@pytest.mark.parametrize(("name", "row", "label", "text", "words"), PROMPTS)
def test_prompt(name, row, label, text, words):
    """The space before the gap belongs to the choice: ``It was[MASK].`` with `` great`` is ``It was great.``"""
    task = cloze_task(get_task(name))
    assert task.words == words
    for index in range(len(words)):
        example = task.example({**row, label: index})
        assert (f"{example.prompt}[MASK]{example.suffix}", example.choices, example.label) == (text, words, index)


def test_a_filled_prompt_reads_as_a_sentence():
    assert (
        cloze_task(get_task("sst2")).example({"sentence": "a film ", "label": 1}).full_text(1) == "a film It was great."
    )


@pytest.mark.parametrize("name", ["boolq", "copa", "squad", "gsm8k", "record"])
def test_a_task_without_a_cloze_prompt_is_refused(name, masked_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=rf"{name} \(.*no cloze prompt for a masked language model; .*sst2, sst5"):
        tasks.prepare(name, tmp_path, masked_tokenizer, context_length=64, masked=True)


# -- rows ---------------------------------------------------------------------------------------------------------


def encode(tokenizer, example, context_length=64):
    return ClozeEncoder(tokenizer, cloze_task(get_task("sst2")), context_length).encode(example)


def test_a_row_is_the_text_as_the_tokenizer_reads_it(masked_tokenizer):
    example = Example("the film was great. It was", (" terrible", " great"), suffix=".")
    (row,) = encode(masked_tokenizer, example).rows
    assert list(row.ids) == masked_tokenizer("the film was great. It was <mask>.").input_ids
    place = row.ids.index(masked_tokenizer.mask_token_id)
    words = [masked_tokenizer(word, add_special_tokens=False).input_ids for word in example.choices]
    assert [(t.choice, t.positions, list(t.tokens)) for t in row.targets] == [
        (i, (place,), word) for i, word in enumerate(words)
    ]


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: spaces are no tokens."""
    raw = Tokenizer(WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    raw.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=raw, cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")


def sentencepiece() -> PreTrainedTokenizerFast:
    """As XLM-R's: a space is the beginning of the token after it."""
    raw = Tokenizer(Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    mask = AddedToken("<mask>", lstrip=True, special=True)
    special = ["<s>", "</s>", "<unk>", mask]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    raw.train_from_iterator(TEXTS * 3, trainer)
    raw.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", mask_token=mask)


@pytest.mark.parametrize("make", [wordpiece, sentencepiece])
def test_other_kinds_of_tokenizer(make):
    tokenizer = make()
    example = Example("the film was great. It was", (" great", " was"), suffix=", it")
    for row in encode(tokenizer, example).rows:
        size = len(row.targets[0].tokens)
        text = "the film was great. It was " + tokenizer.mask_token * size + ", it"
        assert list(row.ids) == tokenizer(text).input_ids
        for target in row.targets:
            assert {row.ids[place] for place in target.positions} == {tokenizer.mask_token_id}
            assert tokenizer.decode(target.tokens).strip() == example.choices[target.choice].strip()


def test_choices_of_other_lengths_have_rows_of_their_own(masked_tokenizer):
    example = Example("", (" great", " zq", " terrible"), suffix=": what")
    long = len(masked_tokenizer(" zq", add_special_tokens=False).input_ids)
    one, several = encode(masked_tokenizer, example).rows
    assert long > 1
    assert [t.choice for t in one.targets] == [0, 2] and [t.choice for t in several.targets] == [1]
    assert list(several.ids) == masked_tokenizer("<mask>" * long + ": what").input_ids
    assert several.targets[0].positions == tuple(range(1, 1 + long))


def test_a_mask_token_in_the_text_is_text(masked_tokenizer):
    (row,) = encode(masked_tokenizer, Example("a <mask> film", (" great",), suffix=" <mask>")).rows
    assert row.ids.count(masked_tokenizer.mask_token_id) == 3
    (target,) = row.targets
    assert target.positions == (len(masked_tokenizer("a <mask> film").input_ids) - 1,)


def test_a_long_text_loses_its_beginning_then_its_end(masked_tokenizer):
    encoder = ClozeEncoder(masked_tokenizer, cloze_task(get_task("sst2")), 12)
    mask = masked_tokenizer.mask_token_id
    whole = masked_tokenizer("the film was great and the cast was lovely", add_special_tokens=False).input_ids
    (row,) = encoder.encode(Example("the film was great and the cast was lovely", (" great",), suffix=".")).rows
    (dot,) = masked_tokenizer(".", add_special_tokens=False).input_ids
    assert list(row.ids) == [0, *whole[-8:], mask, dot, 2]
    (row,) = encoder.encode(Example("ok", (" great",), suffix=" the film was great and the cast was lovely")).rows
    assert row.ids[:2] == (0, mask) and len(row.ids) == 12 and row.ids[-1] == 2
    assert encoder.truncated == 2
    encoder.encode(Example("the film was", (" great",), suffix="."))
    assert encoder.truncated == 2


def test_wrong_choices_and_tokenizers_are_reported(masked_tokenizer, tokenizer):
    with pytest.raises(DataError, match=r"choice '' has 0 tokens"):
        encode(masked_tokenizer, Example("a", ("",)))
    with pytest.raises(DataError, match=r"has 21 tokens, .* context of 20"):
        encode(masked_tokenizer, Example("a", ("z" * 21,)), context_length=20)
    with pytest.raises(ModelError, match="no mask token"):
        encode(tokenizer, Example("a", (" great",)))


# -- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MASKED)
@torch.no_grad()
def test_scores_equal_a_plain_forward_of_one_row(family, tiny_model, masked_tokenizer):
    """In float64; the other rows of a batch and its padding change nothing."""
    model = tiny_model(family, torch.float64)
    examples = [Example(text, (" great", " terrible"), label=i % 2, suffix=".") for i, text in enumerate(TEXTS)]
    encoded = [encode(masked_tokenizer, example) for example in examples]
    batch = tasks.collate(encoded, tasks.pad_id(masked_tokenizer), "cpu", step=8)
    scores = choice_sums(model, batch.rows)[0].view(3, 2)
    expected, losses = [], []
    for text, example in zip(TEXTS, examples, strict=True):
        ids = masked_tokenizer(f"{text} <mask>.", return_tensors="pt").input_ids
        place = (ids[0] == masked_tokenizer.mask_token_id).nonzero().item()
        log_probs = model(ids).logits[0, place].log_softmax(-1)
        words = [masked_tokenizer(word, add_special_tokens=False).input_ids for word in example.choices]
        expected.append(torch.stack([log_probs[word[0]] for word in words]))
        losses.append(-expected[-1].log_softmax(-1)[example.label])
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-5)
    loss = tasks.loss(model, cloze_task(get_task("sst2")), batch).value
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=0, atol=1e-5)


def test_positions_and_context_start_where_the_model_says(tiny_model, masked_tokenizer):
    starts = {family: position_start(tiny_model(family)) for family in (*MASKED, "llama", "opt")}
    assert starts == {"roberta": 2, "bert": 0, "distilbert": 0, "deberta": 0, "llama": 0, "opt": 0}
    model = tiny_model("roberta")
    assert context_length(model, masked_tokenizer) == 256
    row = encode(masked_tokenizer, Example("film " * 400, (" great",), suffix="."), context_length=256)
    batch = tasks.collate([row, encode(masked_tokenizer, Example("a", (" great",)))], 1, "cpu", step=8)
    assert batch.rows.input_ids.shape[1] == 256
    assert tasks.loss(model, cloze_task(get_task("sst2")), batch).value.isfinite()


@torch.no_grad()
def test_peft_changes_nothing_about_it(tiny_model, masked_tokenizer):
    """With LoRA's B at zero the scores are those of the bare model."""
    encoded = [encode(masked_tokenizer, Example(text, (" great", " terrible"), suffix=".")) for text in TEXTS]
    rows = tasks.collate(encoded, 1, "cpu").rows
    bare = choice_sums(tiny_model("roberta"), rows)[0]
    wrapped = get_peft_model(tiny_model("roberta"), LoraConfig(r=2, target_modules=["query"])).eval()
    assert is_masked(wrapped) and position_start(wrapped) == 2
    torch.testing.assert_close(choice_sums(wrapped, rows)[0], bare)


@torch.no_grad()
def test_the_head_computes_logits_of_targets_alone(tiny_model, masked_tokenizer):
    model = tiny_model("roberta")
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda *args: shapes.append(args[-1].shape))
    batch = tasks.collate([encode(masked_tokenizer, Example("a", (" great",), suffix=".")) for _ in range(3)], 1, "cpu")
    tasks.loss(model, cloze_task(get_task("sst2")), batch)
    handle.remove()
    assert shapes == [(1, 3, 320)]
    assert model(torch.tensor([[0, 5, 6, 2]])).logits.shape == (1, 4, 320)  # nothing is left behind


# -- one's own data -----------------------------------------------------------------------------------------------


def own(tmp_path, *rows):
    folder = tmp_path / "own"
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("prompt", "choices", "text", "read"),
    [
        ("the film. It was [MASK].", ["great", "bad"], "the film. It was great.", (" great", " bad")),
        ("the film. It was [MASK].", [" great", " bad"], "the film. It was great.", (" great", " bad")),
        ("the film. It was <mask>.", ["great", "bad"], "the film. It was great.", (" great", " bad")),
        ("([MASK]) the film", ["great", "bad"], "(great) the film", ("great", "bad")),
        ("the film. It was", [" great", " bad"], "the film. It was great", (" great", " bad")),
    ],
)
def test_own_rows_place_the_choice(prompt, choices, text, read, masked_tokenizer, tmp_path):
    data = own(tmp_path, {"prompt": prompt, "choices": choices, "label": 0})
    prepared = tasks.prepare(None, data, masked_tokenizer, context_length=64, masked=True)
    example = prepared.train[0].example
    assert (example.full_text(0), example.choices) == (text, read)
    assert prepared.train[0].rows[0].ids.count(masked_tokenizer.mask_token_id) >= 1


def test_own_rows_that_do_not_fit_are_refused(tokenizer, masked_tokenizer, tmp_path):
    def prepare(row, masked):
        chosen = masked_tokenizer if masked else tokenizer
        return tasks.prepare(None, own(tmp_path, row), chosen, context_length=64, masked=masked)

    two = {"prompt": "[MASK] or [MASK]", "choices": ["a", "b"], "label": 0}
    with pytest.raises(DataError, match=r"line 1: field \"prompt\" holds \[MASK\] 2 times, expected once"):
        prepare(two, masked=True)
    for row in ({"text": "a film"}, {"prompt": "a", "completion": "b"}, {"messages": []}):
        with pytest.raises(ConfigError, match=r"is for a causal model .*, and this is a masked language model"):
            prepare(row, masked=True)
    with pytest.raises(DataError, match=r"line 1: .*\[MASK\], which only a masked language model fills"):
        prepare({**two, "prompt": "It was [MASK]."}, masked=False)


def test_own_task_keeps_what_it_is(tmp_path, tokenizer):
    from zoft.tasks.chat import ChatTemplate
    from zoft.tasks.own_task import own_task
    from zoft.tasks.rows import Located

    task = own_task(
        tmp_path / "x.jsonl",
        [Located({"prompt": "a", "choices": ["b", "c"], "label": 0}, "x")],
        ChatTemplate(tokenizer),
    )
    assert own_cloze_task(task, "<mask>").prompt == "{prompt}[MASK]"
