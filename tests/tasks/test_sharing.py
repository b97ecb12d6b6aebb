"""Scores that depend on padding, or on the longest row of a batch: such rows share no batch."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from tests.tasks.conftest import make_task
from tests.tasks.test_losses import EXAMPLES, reference_log_probs
from zoft.tasks import evaluate, objective, sharing
from zoft.tasks.cloze import ClozeEncoder
from zoft.tasks.evaluate import by_length
from zoft.tasks.generate import generate
from zoft.tasks.sharing import Sharing
from zoft.tasks.types import Example, Row, Target

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
CAUSAL = {
    "recurrent_gemma": {
        "lru_width": 32,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 64,
        "head_dim": 8,
    },
    "mamba": {"state_size": 8, "expand": 2, "conv_kernel": 4},
    "falcon_mamba": {"state_size": 8, "expand": 2, "conv_kernel": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256},
    "phi3": {"original_max_position_embeddings": 8, "rope_scaling": {"type": "longrope", **LONGROPE}},
    "llama": {"max_position_embeddings": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
}
STILL = {"pad_token_id": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 1}
MASKED = {
    "electra": {"embedding_size": 32},
    "convbert": {"embedding_size": 32},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32},
    "mpnet": {},
    "camembert": {"max_position_embeddings": 258},
}
AFFECTED = ("recurrent_gemma", "convbert")


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """No architecture was tried before."""
    monkeypatch.setattr(sharing, "_known", {})


def make(family, dtype=torch.float32):
    torch.manual_seed(0)
    if family in CAUSAL:
        config = AutoConfig.for_model(family, **{**COMMON, **CAUSAL[family]})
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()
    config = AutoConfig.for_model(family, **{**COMMON, **STILL, **MASKED[family]})
    return AutoModelForMaskedLM.from_config(config).to(dtype).eval()


def rows_of(family, encode, masked_tokenizer):
    task = make_task("classification")
    if family in CAUSAL:
        return task, encode(task, EXAMPLES)
    encoder = ClozeEncoder(masked_tokenizer, task, 128)
    texts = ("the film It was", "It was", "Anna got a new toy. She was very very happy. It was")
    return task, [encoder.encode(Example(text, (" great", " terrible maybe"), 1, suffix=".")) for text in texts]


def score_alone(model, encoded):
    """The mean classification loss from one unpadded forward pass for every row."""
    losses = []
    for one in encoded:
        means = {}
        for row in one.rows:
            rope = getattr(model.base_model, "rotary_emb", None)
            if getattr(rope, "rope_type", "") == "dynamic":  # transformers keeps the factor of the longest row so far
                rope.inv_freq, rope.max_seq_len_cached = rope.original_inv_freq.clone(), rope.original_max_seq_len
            for target in row.targets:
                means[target.choice] = reference_log_probs(model, row, target).mean().double()
        scores = torch.stack([means[choice] for choice in sorted(means)])
        losses.append(torch.logsumexp(scores, 0) - scores[one.label])
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_scores_are_those_of_plain_rows_whatever_the_batch(family, encode, tokenizer, masked_tokenizer):
    model = make(family)
    task, encoded = rows_of(family, encode, masked_tokenizer)
    expected = score_alone(make(family), encoded)
    for size in (1, 2, 16):
        assert evaluate(model, tokenizer, task, encoded, batch_size=size).loss == pytest.approx(expected, abs=1e-5)
        loss = objective("loss", task, tokenizer, batch_size=size)(model, encoded)
        assert loss.value.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", AFFECTED)
def test_padding_that_counts_is_found_in_every_dtype(family, dtype, encode, masked_tokenizer):
    model = make(family, dtype)
    _, encoded = rows_of(family, encode, masked_tokenizer)
    found = sharing.sharing(model, (row for one in encoded for row in one.rows), 0)
    assert found.padding is not None and "batches hold rows of one length" in found.warning
    assert found.step(dtype) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bloom", "gptj", "mamba", "falcon_mamba", "electra", "mpnet", "camembert", "phi3"])
def test_padding_that_does_not_count_is_no_warning(family, dtype, encode, masked_tokenizer):
    model = make(family, dtype)
    _, encoded = rows_of(family, encode, masked_tokenizer)
    assert sharing.sharing(model, (row for one in encoded for row in one.rows), 0).warning is None


@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_gradients_are_those_of_plain_rows(kind, encode, tokenizer):
    model, task = make("recurrent_gemma"), make_task(kind)
    encoded = encode(task, EXAMPLES)
    loss = objective("loss", task, tokenizer, batch_size=4)
    loss(model, encoded).value.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    parts = [loss(model, [one]) for one in encoded]
    (sum(part.total for part in parts) / sum(part.weight for part in parts)).backward()
    for name, one in model.named_parameters():
        torch.testing.assert_close(found[name], one.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["recurrent_gemma", "phi3"])
def test_generated_text_does_not_depend_on_the_batch(family, encode, tokenizer):
    model = make(family)
    task = make_task("generation", scores={"f1": lambda text, _: float(len(text))}, max_new_tokens=5)
    texts = ("the film It was", "It", "Anna got a new toy. Anna was happy because")
    encoded = encode(task, [Example(text, (" x",), answers=("x",)) for text in texts])
    alone = [generate(model, tokenizer, task, [one.prompt_ids])[0] for one in encoded]
    for size in (1, 2, 16):
        assert list(evaluate(model, tokenizer, task, encoded, batch_size=size).predictions) == alone


def test_an_architecture_is_tried_once(encode, tokenizer, monkeypatch):
    """So that a run that is resumed with other weights makes the same batches."""
    tried = []
    effect = sharing._effect_of_padding
    monkeypatch.setattr(sharing, "_effect_of_padding", lambda *given: tried.append(1) or effect(*given))
    task = make_task("classification")
    for _ in range(2):
        evaluate(make("recurrent_gemma"), tokenizer, task, encode(task, EXAMPLES), batch_size=4)
    assert tried == [1]


def test_rows_share_a_batch_on_one_side_of_the_boundary():
    short, long = Sharing(boundary=8), Sharing(boundary=8, by_length=True)
    assert [short.key(size) for size in (1, 8, 9, 30)] == [0, 0, 1, 1]
    assert [long.key(size) for size in (1, 8, 9, 30)] == [0, 0, 9, 30]
    row = Row((1,) * 9, (Target(0, (8,), (1,)),))
    assert not short.joins([row, Row((1, 2), row.targets)]) and short.joins([row, row])
    assert list(by_length([1, 9, 8, 12], lambda size: size, 4, short.key)) == [[12, 9], [8, 1]]
