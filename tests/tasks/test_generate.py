"""Generation against a plain argmax loop; stopping on decoded text."""

import pytest
import torch
from transformers import GenerationConfig

from tests.conftest import FAMILIES
from tests.tasks.conftest import make_task
from zoft.tasks.generate import generate
from zoft.tasks.text_metrics import token_f1
from zoft.tasks.types import Example

PROMPTS = ["the film It was", "Anna got a new toy. Anna was happy because", "It"]


def task(**fields):
    return make_task("generation", scores={"f1": token_f1}, **{"max_new_tokens": 12} | fields)


def greedy(model, tokenizer, prompt, count):
    ids = tokenizer(prompt)["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids[len(tokenizer(prompt)["input_ids"]) :]


def prompt_ids(encode, prompts, used):
    return [one.prompt_ids for one in encode(used, [Example(prompt, (" x",), answers=("x",)) for prompt in prompts])]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_generates_what_each_prompt_does_alone(family, tiny_model, encode, tokenizer):
    model = tiny_model(family)
    texts = generate(model, tokenizer, task(), prompt_ids(encode, PROMPTS, task()))
    alone = [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in alone]


def test_the_checkpoint_s_own_sampling_settings_do_not_leak_in(tiny_model, encode, tokenizer):
    model = tiny_model("llama")
    used = task()
    ids = prompt_ids(encode, PROMPTS, used)
    expected = generate(model, tokenizer, used, ids)
    model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=7)
    assert generate(model, tokenizer, used, ids) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": list(range(3, 200))},
        {"begin_suppress_tokens": list(range(3, 200))},
        {"bad_words_ids": [[i] for i in range(3, 200)]},
        {"sequence_bias": [[[5], 100.0]]},
        {"forced_bos_token_id": 7},
        {"forced_eos_token_id": 7},
        {"exponential_decay_length_penalty": [1, 9.0]},
        {"min_length": 200},
        {"guidance_scale": 3.0},
        {"encoder_repetition_penalty": 3.0},
        {"max_time": 0.0},
        {"stop_strings": ["e"]},
        {"num_return_sequences": 2, "do_sample": True},
        {"penalty_alpha": 0.6},
        {"cache_implementation": "static"},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_only_end_tokens_are_taken_from_the_checkpoint(settings, tiny_model, encode, tokenizer):
    model = tiny_model("llama")
    used = task()
    ids = prompt_ids(encode, PROMPTS, used)
    expected = generate(model, tokenizer, used, ids)
    model.generation_config = declared = GenerationConfig(**settings)
    assert generate(model, tokenizer, used, ids) == expected
    assert model.generation_config is declared  # it is written with the checkpoint


def test_generation_stops_once_the_decoded_text_matches(tiny_model, encode, tokenizer):
    """The stop is inside a token's text here, so a comparison of ids would never find it."""
    model = tiny_model("llama")
    (whole,) = generate(model, tokenizer, task(), prompt_ids(encode, PROMPTS[:1], task()))
    stop = whole[4]
    assert stop.isalnum() and len(whole) > 8
    used = task(stop=stop)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    (stopped,) = generate(model, tokenizer, used, prompt_ids(encode, PROMPTS[:1], used))
    assert stopped == whole[: whole.index(stop) + 1]
    assert len(calls) < 12


def test_generation_stays_within_the_context(tiny_model, encode, tokenizer):
    model = tiny_model("opt", max_position_embeddings=16)
    used = task(max_new_tokens=50)
    (encoded,) = encode(used, [Example("the plot was worse. " * 9, (" x",), answers=("x",))], context_length=16)
    assert len(encoded.prompt_ids) == 8
    generate(model, tokenizer, used, [encoded.prompt_ids])
