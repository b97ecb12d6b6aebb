"""LoRA and prefixes on every model family: initial weights, results, side effects and errors."""

import sys

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from tests.conftest import FAMILIES, MASKED
from zoft.errors import ConfigError, ModelError
from zoft.model.adapters import LoRA, Prefix, adapter_of, attach, mode_of, virtual_tokens
from zoft.model.adapters.prefix import activations, draw_tokens
from zoft.model.architecture import context_length
from zoft.tasks import TASKS
from zoft.tasks.batches import pad
from zoft.tasks.generate import generate
from zoft.tasks.logits import target_log_probs
from zoft.tasks.types import Row, Target
from zoft.weights.blocks import trainable_blocks
from zoft.weights.coverage import verify_coverage

TEXTS = ([7, 31, 5, 90, 12, 44, 8], [9, 100, 17])  # of different lengths: the second is padded on the left
TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "gemma": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "roberta": ("query", "value"),
    "bert": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "deberta": ("query_proj", "value_proj"),
}


def row(ids: list[int]) -> Row:
    return Row(tuple(ids), (Target(0, positions=(len(ids) - 3, len(ids) - 2), tokens=tuple(ids[-2:])),))


def log_probs(model: torch.nn.Module, texts) -> torch.Tensor:
    with torch.no_grad():
        return target_log_probs(model, pad([row(list(text)) for text in texts], 0, "cpu"))


def randomise_(model: torch.nn.Module) -> None:
    """Move every adapter weight, so that no block is without effect."""
    generator = torch.Generator().manual_seed(1)
    for block in trainable_blocks(model):
        block.parameter.data += 0.3 * torch.randn(block.shape, generator=generator)


# -- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES + MASKED)
def test_lora_is_on_query_and_value_and_starts_as_the_base(tiny_model, family) -> None:
    before = log_probs(tiny_model(family), TEXTS)
    model = attach(tiny_model(family), LoRA(rank=2), seed=0)
    torch.testing.assert_close(log_probs(model, TEXTS), before, rtol=1e-6, atol=1e-6)
    assert adapter_of(model) == LoRA(rank=2, alpha=16, targets=TARGETS[family]) and mode_of(model) == "lora"
    blocks = trainable_blocks(model)
    modules = {block.name.split(".")[-4] for block in blocks}
    assert modules == set(TARGETS[family])
    assert all(block.name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for block in blocks)
    assert len(blocks) == 2 * 2 * len(TARGETS[family])  # A and B, two layers
    randomise_(model)
    assert not torch.allclose(log_probs(model, TEXTS), before)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "roberta"])
def test_lora_is_alpha_over_rank_times_b_a(tiny_model, family) -> None:
    """Against float64 weights into which the update was added."""
    model = attach(tiny_model(family), LoRA(rank=3, alpha=5), seed=0).double()
    randomise_(model)
    merged = tiny_model(family).double()
    weights = dict(merged.named_parameters())
    pairs = {block.name: block.parameter.detach() for block in trainable_blocks(model)}
    for name, a in pairs.items():
        if ".lora_A." in name:
            b = pairs[name.replace(".lora_A.", ".lora_B.")]
            weights[name.replace(".lora_A.default", "")].data += 5 / 3 * (b @ a)
    torch.testing.assert_close(log_probs(model, TEXTS), log_probs(merged, TEXTS), rtol=1e-6, atol=1e-6)


def test_lora_start_is_a_function_of_seed_and_name(tiny_model) -> None:
    def start(seed: int, **settings) -> dict[str, torch.Tensor]:
        model = attach(tiny_model("llama"), LoRA(**settings), seed=seed)
        return {block.name: block.parameter.detach() for block in trainable_blocks(model)}

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    a = [name for name in first if ".lora_A." in name]
    assert all(not torch.equal(first[name], other[name]) for name in a)
    assert all(bool((first[name] == 0).all()) for name in first if ".lora_B." in name)
    assert torch.stack([first[name].flatten() for name in a]).unique(dim=0).shape[0] == len(a)  # no two alike
    alone = start(0, targets=("v_proj",))
    assert all(torch.equal(first[name], alone[name]) for name in alone)
    flat = torch.cat([first[name].flatten() for name in a])
    bound = 32**-0.5
    assert flat.abs().max() <= bound and flat.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_lora_on_conv1d(tiny_model) -> None:
    """GPT-2 keeps its matrices transposed, and query, key and value in one."""
    torch.manual_seed(0)
    model = attach(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=320)).eval(), LoRA(), seed=0)
    blocks = {block.name: block.shape for block in trainable_blocks(model)}
    assert blocks["transformer.h.0.attn.c_attn.lora_A.default.weight"] == (8, 32)
    assert blocks["transformer.h.0.attn.c_attn.lora_B.default.weight"] == (96, 8)


# -- prefixes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_starts_as_text_before_the_row(tiny_model, family) -> None:
    """Attention masks and positions are right only if activations as a prefix are the text that they are of."""
    tokens = draw_tokens(5, 320, (0, 1, 2), seed=3)
    expected = torch.cat([log_probs(tiny_model(family), [[*tokens, *text]]) for text in TEXTS])
    model = attach(tiny_model(family), Prefix(), seed=3, special=(0, 1, 2))
    torch.testing.assert_close(log_probs(model, TEXTS), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(log_probs(tiny_model(family), TEXTS), expected, atol=1e-3)
    assert adapter_of(model) == Prefix(tokens=5) and mode_of(model) == "prefix" and virtual_tokens(model) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_generated_after_a_prefix_as_after_its_text(tiny_model, tokenizer, family) -> None:
    tokens = draw_tokens(5, 320, (0, 1, 2), seed=3)
    task = TASKS["squad"]
    expected = [generate(tiny_model(family), tokenizer, task, [[*tokens, *text]])[0] for text in TEXTS]
    model = attach(tiny_model(family), Prefix(), seed=3, special=(0, 1, 2))
    assert generate(model, tokenizer, task, TEXTS) == expected
    assert any(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_has_a_block_for_keys_and_values_of_every_layer(tiny_model, family) -> None:
    model = attach(tiny_model(family), Prefix(tokens=4), seed=0)
    width = 16 if family in ("llama", "qwen2", "gemma") else 32  # two heads of keys and values, or four
    names = [f"prompt_encoder.default.layers.{layer}.{part}" for layer in (0, 1) for part in ("keys", "values")]
    assert [(block.name, block.shape) for block in trainable_blocks(model)] == [(name, (4, width)) for name in names]
    before = log_probs(model, TEXTS)
    for block in trainable_blocks(model):
        kept = block.parameter.detach().clone()
        block.parameter.data += 0.5
        assert not torch.allclose(log_probs(model, TEXTS), before), block.name
        block.parameter.data = kept
    assert torch.equal(log_probs(model, TEXTS), before)


def test_gradients_reach_every_prefix_and_nothing_else(tiny_model) -> None:
    """Against a central difference in float64."""
    model = attach(tiny_model("opt").double(), Prefix(), seed=0)  # Llama computes norms in float32 in any dtype
    for block in trainable_blocks(model):
        block.parameter.data = block.parameter.data.double()
    rows = pad([row(list(text)) for text in TEXTS], 0, "cpu")
    inputs = {name: getattr(rows, name) for name in ("input_ids", "attention_mask", "position_ids")}

    def loss() -> torch.Tensor:
        return model(**inputs).logits.log_softmax(-1)[:, -1, 7]

    loss().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    for block in trainable_blocks(model):
        direction = torch.randn(block.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        ends = []
        for side in (1, -1):
            block.parameter.data += side * 1e-4 * direction
            ends.append(float(loss().sum()))
            block.parameter.data -= side * 1e-4 * direction
        slope = (ends[0] - ends[1]) / 2e-4
        assert float((block.parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-10)


def test_prefix_tokens_are_real_and_a_function_of_the_seed() -> None:
    special = set(range(300))
    assert all(set(draw_tokens(5, 320, special, seed)).isdisjoint(special) for seed in range(20))
    assert len({tuple(draw_tokens(5, 320, (), seed)) for seed in range(20)}) == 20
    with pytest.raises(ModelError, match=r"prefix.tokens is 21, more than the 20 tokens of the vocabulary"):
        draw_tokens(21, 320, special, 0)


def test_a_prefix_does_not_depend_on_the_number_of_threads(tiny_model) -> None:
    def start(count: int) -> list[torch.Tensor]:
        torch.set_num_threads(count)
        try:
            model = attach(tiny_model("llama", hidden_size=256, intermediate_size=512), Prefix(tokens=64), seed=0)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(1)
        return [block.parameter.detach() for block in trainable_blocks(model)]

    assert all(torch.equal(a, b) for a, b in zip(start(1), start(2), strict=True))


def test_a_prefix_takes_its_positions_from_the_context(tiny_model, tokenizer) -> None:
    model = tiny_model("llama")
    assert context_length(model, tokenizer) == 256
    assert context_length(attach(model, Prefix(tokens=6), seed=0), tokenizer) == 250


# -- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [LoRA(), Prefix()], ids=["lora", "prefix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_are_float32_in_a_half_precision_model(tiny_model, adapter, dtype) -> None:
    model = attach(tiny_model("llama", dtype=dtype), adapter, seed=0)
    assert {block.parameter.dtype for block in trainable_blocks(model)} == {torch.float32}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {dtype}
    rows = pad([row(list(text)) for text in TEXTS], 0, "cpu")
    with torch.no_grad():
        output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, position_ids=rows.position_ids)
    assert output.logits.dtype == dtype


@pytest.mark.parametrize("adapter", [LoRA(), Prefix()], ids=["lora", "prefix"])
def test_generators_are_left_alone(tiny_model, adapter) -> None:
    model = tiny_model("llama")
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    attach(model, adapter, seed=0)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [LoRA(), Prefix()], ids=["lora", "prefix"])
def test_every_read_of_an_adapter_can_be_perturbed(tiny_model, family, adapter) -> None:
    model = attach(tiny_model(family), adapter, seed=0)
    randomise_(model)
    rows = pad([row(list(text)) for text in TEXTS], 0, "cpu")
    assert verify_coverage(trainable_blocks(model), lambda: float(target_log_probs(model, rows).sum())) is None


def test_the_base_has_no_blocks(tiny_model) -> None:
    for adapter in (LoRA(), Prefix()):
        model = attach(tiny_model("opt"), adapter, seed=0)
        trained = {id(block.parameter) for block in trainable_blocks(model)}
        base = dict(tiny_model("opt").named_parameters())
        frozen = [p for p in model.parameters() if id(p) not in trained]
        assert len(frozen) == len(base)


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_wrong_targets_are_named_beside_what_there_is(tiny_model) -> None:
    listed = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ModelError, match=rf"this llama model has no linear module called 'query'; there are {listed}"):
        attach(tiny_model("llama"), LoRA(targets=("q_proj", "query")), seed=0)
    with pytest.raises(
        ModelError, match=r"'self_attn' is also model.layers.0.self_attn, which is not linear|no linear"
    ):
        attach(tiny_model("llama"), LoRA(targets=("self_attn",)), seed=0)
    odd = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"zoft does not know .* by name; .*lora.targets=NAME,NAME: it has 0"):
        attach(odd, LoRA(), seed=0)


@pytest.mark.parametrize("family", MASKED)
def test_masked_models_take_no_prefix(tiny_model, family) -> None:
    with pytest.raises(ModelError, match=r"--prefix needs a causal language model; .* try --lora"):
        attach(tiny_model(family), Prefix(), seed=0)


def test_a_model_without_keys_and_values_takes_no_prefix() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(ModelError, match=r"keys and values of one shape .* this mamba model has none: try --lora"):
        attach(model, Prefix(), seed=0)


def test_activations_are_those_of_the_cache(tiny_model) -> None:
    model = tiny_model("llama")
    layers = activations(model, [5, 6, 7])
    cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert len(layers) == 2
    assert all(torch.equal(keys, cache.layers[i].keys[0]) for i, (keys, _) in enumerate(layers))


def test_without_peft_its_extra_is_named(tiny_model, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for adapter in (LoRA(), Prefix()):
        with pytest.raises(ConfigError, match=r"need the library peft: pip install 'zoft\[peft\]'"):
            attach(tiny_model("llama"), adapter, seed=0)


def test_adapters_of_other_kinds_are_named(tiny_model) -> None:
    other = get_peft_model(tiny_model("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ModelError, match=r"an adapter of the type IA3; zoft supports LORA and PREFIX_TUNING"):
        adapter_of(other)
    two = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    two.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"the model has 2 adapters \(default, second\)"):
        adapter_of(two)


def test_a_model_wrapped_by_its_user_is_known(tiny_model) -> None:
    wrapped = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "k_proj"]))
    assert adapter_of(wrapped) == LoRA(rank=4, alpha=8, targets=("k_proj", "v_proj"))
    assert adapter_of(tiny_model("llama")) is None and mode_of(tiny_model("llama")) == "full"
