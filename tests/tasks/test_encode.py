import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from tests.tasks.conftest import make_task
from zoft.errors import DataError, ModelError
from zoft.tasks.encode import Encoder
from zoft.tasks.types import Example


def with_bos(tokenizer):
    """The tokenizer, adding its BOS token as Llama's does."""
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    return changed


def decoded(tokenizer, ids):
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def target_text(tokenizer, row):
    return decoded(tokenizer, row.targets[0].tokens)


def test_rows_predict_exactly_the_choice(encode, tokenizer):
    example = Example("the film It was", (" great and lovely", " terrible plot"), 0)
    (encoded,) = encode("classification", [example])
    assert [target_text(tokenizer, row) for row in encoded.rows] == list(example.choices)
    for row, choice in zip(encoded.rows, example.choices, strict=True):
        last = row.targets[0].tokens[-1:]
        assert decoded(tokenizer, row.ids + last) == example.prompt + choice  # the last token is predicted, not read
        positions = row.targets[0].positions
        assert positions == tuple(range(len(row.ids) - len(positions), len(row.ids)))


def test_one_token_choices_share_one_row(encode, tokenizer):
    (encoded,) = encode("classification", [Example("the film. It", (" was", " the"), 1)])
    (row,) = encoded.rows
    assert decoded(tokenizer, row.ids) == "the film. It"
    assert [decoded(tokenizer, target.tokens) for target in row.targets] == [" was", " the"]
    assert [target.positions for target in row.targets] == [(len(row.ids) - 1,)] * 2
    assert encoded.tokens == len(row.ids)


def test_a_token_across_the_boundary_belongs_to_the_choice(encode, tokenizer):
    assert len(tokenizer(" great")["input_ids"]) == 1
    (encoded,) = encode("classification", [Example("It was gr", ("eat", "een"), 0)])
    first, second = (row.targets[0].tokens for row in encoded.rows)
    assert decoded(tokenizer, first) == " great"
    assert decoded(tokenizer, second).endswith("een")
    assert decoded(tokenizer, encoded.rows[0].ids) == "It was"


def test_merging_across_the_boundary_defeats_the_length_difference(tokenizer):
    """The reference takes len(full) - len(prompt), here 0: the loss would run over the whole prompt."""
    full, prompt = (len(tokenizer(text)["input_ids"]) for text in ("It was great", "It was gr"))
    assert full - prompt <= 0


def test_lm_losses_read_only_the_gold_row(encode, tokenizer):
    (encoded,) = encode("choice", [Example("It was", (" great and", " terrible and", " lovely and"), 2)])
    assert len(encoded.rows) == 3
    assert [target_text(tokenizer, row) for row in encoded.loss_rows] == [" lovely and"]
    assert encoded.tokens == len(encoded.loss_rows[0].ids)


@pytest.mark.parametrize("bos", [True, False])
def test_truncation_keeps_the_end_of_the_prompt_and_bos(tokenizer, bos):
    used = with_bos(tokenizer) if bos else tokenizer
    encoder = Encoder(used, make_task("classification"), 24)
    prompt = "the plot was terrible and the ending was worse. " * 5 + "Is it great?"
    encoded = encoder.encode(Example(prompt, (" Yes", " No or maybe"), 0))
    assert encoder.truncated == 1
    longest = max(len(row.ids) + 1 for row in encoded.rows)
    assert longest == 24
    for row in encoded.rows:
        kept = row.ids[: row.targets[0].positions[0] + 1]
        assert (kept[0] == 1) is bos
        assert decoded(used, kept).endswith("Is it great?")
    # every choice is judged after the same prompt
    assert len({row.ids[: row.targets[0].positions[0] + 1] for row in encoded.rows}) == 1


def test_no_truncation_where_the_row_just_fits(tokenizer):
    example = Example("the film It was", (" great and lovely",), 0)
    length = len(tokenizer(example.full_text(0))["input_ids"])
    encoder = Encoder(tokenizer, make_task("choice"), length)
    assert len(encoder.encode(example).rows[0].ids) == length - 1
    assert encoder.truncated == 0


def test_a_target_longer_than_the_context_is_an_error(encode):
    with pytest.raises(DataError, match=r'field "label" has .* tokens, more than the context of 8'):
        encode("choice", [Example("the", (" great lovely film plot" * 5,))], context_length=8)


def test_choice_of_length_zero_is_an_error(encode):
    with pytest.raises(DataError, match=r"choice 1 \(''\) has length 0"):
        encode("classification", [Example("It was", (" great", ""), 0)])


def test_generation_prompt_leaves_room(encode, tokenizer):
    task = make_task("generation", max_new_tokens=20)
    (encoded,) = encode(task, [Example("the plot was worse. " * 20, (" Yes\n",), answers=("Yes",))], context_length=60)
    assert len(encoded.prompt_ids) == 40
    assert decoded(tokenizer, encoded.prompt_ids).endswith("plot was worse. ")


def test_a_row_cut_only_for_generation_counts_once(tokenizer):
    encoder = Encoder(tokenizer, make_task("generation", max_new_tokens=20), 60)
    fits = len(tokenizer("the plot was worse. " * 5)["input_ids"])
    assert 40 < fits < 58
    encoder.encode(Example("the plot was worse. " * 5, (" Yes",), answers=("Yes",)))
    assert encoder.truncated == 1
    encoder.encode(Example("the plot was worse. " * 30, (" Yes",), answers=("Yes",)))
    assert encoder.truncated == 2


def test_own_completions_end_with_eos(encode, tokenizer):
    (encoded,) = encode(make_task("generation", append_eos=True), [Example("It was", (" great",))])
    assert encoded.rows[0].targets[0].tokens[-1] == tokenizer.eos_token_id
    assert target_text(tokenizer, encoded.rows[0]) == " great<eos>"


@pytest.mark.parametrize("bos", [True, False])
def test_text_predicts_every_token_that_has_one_before_it(tokenizer, bos):
    used = with_bos(tokenizer) if bos else tokenizer
    text = "Anna got a new toy."
    (row,) = Encoder(used, make_task("text"), 64).encode(Example("", (text,))).rows
    ids = tokenizer(text)["input_ids"]
    assert list(row.targets[0].tokens) == (ids if bos else ids[1:])


def test_long_text_keeps_its_start(tokenizer):
    encoder = Encoder(tokenizer, make_task("text"), 10)
    text = "Anna got a new toy. " * 10
    (row,) = encoder.encode(Example("", (text,))).rows
    assert [*row.ids, row.targets[0].tokens[-1]] == tokenizer(text)["input_ids"][:10]
    assert encoder.truncated == 1


def test_multibyte_characters_stay_whole(encode, tokenizer):
    (encoded,) = encode("choice", [Example("It was é", ("ö 漢", " x"), 0)])
    assert target_text(tokenizer, encoded.rows[0]) == "ö 漢"


def test_a_tokenizer_without_offsets_is_an_error(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="needs a fast tokenizer"):
        Encoder(Slow(), make_task("text"), 10)


def test_real_tokenizer_with_bos(stories260k, encode):
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(stories260k)
    (encoded,) = encode("classification", [Example("Lily got a toy. She was", (" happy", " sad"), 0)], tokenizer=real)
    for row, choice in zip(encoded.rows, (" happy", " sad"), strict=True):
        prompt = row.ids[: row.targets[0].positions[0] + 1]
        assert prompt[0] == real.bos_token_id and prompt.count(real.bos_token_id) == 1
        assert list(prompt + row.targets[0].tokens) == real("Lily got a toy. She was" + choice)["input_ids"]
        assert real.decode(row.targets[0].tokens) == choice.strip()


@pytest.fixture(scope="module")
def bos_encoder(tokenizer):
    return Encoder(with_bos(tokenizer), make_task("choice"), 10_000)


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_text_is_cut_at_the_first_token_beyond_the_boundary(bos_encoder, tokenizer, prompt, choice):
    (row,) = bos_encoder.encode(Example(prompt, (choice,))).rows
    found = tokenizer(prompt + choice, return_offsets_mapping=True)
    target = row.targets[0]
    read = row.ids[1 : target.positions[0] + 1]  # without BOS
    assert list(read + target.tokens) == found["input_ids"]
    ends = [end for _, end in found["offset_mapping"]]
    assert all(end <= len(prompt) for end in ends[: len(read)])
    assert ends[len(read)] > len(prompt)
