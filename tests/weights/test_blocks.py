import copy
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from tests.conftest import FAMILIES, MASKED
from zoft.weights import blocks as blocks_module
from zoft.weights.blocks import Block, architecture_hash, statistics, trainable_blocks


def block(values: torch.Tensor, name: str = "w") -> Block:
    return Block(name, torch.nn.Parameter(values))


def test_tied_tensor_is_one_block_under_its_first_name(tiny_model):
    tied = trainable_blocks(tiny_model("llama", tie_word_embeddings=True))
    untied = trainable_blocks(tiny_model("llama", tie_word_embeddings=False))
    assert [b.name for b in untied] == [b.name for b in tied] + ["lm_head.weight"]
    assert tied[0].name == "model.embed_tokens.weight"


def test_frozen_parameters_are_no_blocks(tiny_model):
    model = tiny_model("opt")
    model.get_input_embeddings().weight.requires_grad_(False)
    assert all("embed_tokens" not in b.name for b in trainable_blocks(model))


def test_names_are_those_of_the_unwrapped_model(tiny_model):
    model = tiny_model("llama")
    names = [b.name for b in trainable_blocks(model)]
    assert [b.name for b in trainable_blocks(torch.nn.DataParallel(model))] == names
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    lora = [b.name for b in trainable_blocks(wrapped)]
    assert lora[0] == "model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize("family", FAMILIES + MASKED)
def test_statistics_equal_float64_reference(tiny_model, family):
    found = trainable_blocks(tiny_model(family))
    weights = [b.parameter.detach().double() for b in found]
    expected = [[w.mean(), w.var(correction=0)] for w in weights]
    torch.testing.assert_close(statistics(found), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-9)


@settings(max_examples=30)
@given(size=st.integers(1, 700), mean=st.sampled_from([0.0, 1.0, 300.0]), chunk=st.sampled_from([1, 7, 64, 1024]))
def test_statistics_join_chunks_exactly(size, mean, chunk):
    """Uneven chunks and a mean far above the spread, where the sum-of-squares formula loses everything."""
    values = mean + 1e-3 * torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "_CHUNK", {"cpu": chunk})
        found = statistics([block(values)])[0]
    reference = torch.stack([values.mean(), values.var(correction=0)])
    torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-15)


def test_half_precision_statistics_lose_no_digits():
    """A bf16 sum of 2**18 ones stops at 256; ours does not."""
    values = torch.ones(2**18, dtype=torch.bfloat16)
    values[: 2**17] = 1.5
    assert statistics([block(values)]).tolist() == [[1.25, 0.0625]]


def test_architecture_hash_is_the_documented_digest():
    found = [block(torch.zeros(2, 3), "a.weight"), block(torch.zeros(2), "a.bias")]
    assert architecture_hash(found) == hashlib.sha256(b'[["a.weight",[2,3]],["a.bias",[2]]]').hexdigest()


def test_architecture_hash_depends_on_names_shapes_and_order_only(tiny_model):
    model = tiny_model("qwen2")
    found = trainable_blocks(model)
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data.add_(1)
    assert architecture_hash(trainable_blocks(changed.half())) == architecture_hash(found)
    hashes = {architecture_hash(trainable_blocks(tiny_model(family))) for family in FAMILIES}
    assert len(hashes) == len(FAMILIES)
    assert architecture_hash(found[::-1]) != architecture_hash(found)
