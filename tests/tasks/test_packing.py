"""Packed rows against plain ones: one row for each choice, alone and without padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import FAMILIES
from tests.tasks.conftest import make_task
from tests.tasks.test_losses import EXAMPLES, ONE_TOKEN, plain_scores, reference_log_probs
from zoft.noise.direction import NoiseDirection
from zoft.tasks import collate, evaluate, loss
from zoft.tasks.batches import pad
from zoft.tasks.logits import target_log_probs
from zoft.tasks.losses import choice_sums
from zoft.tasks.packing import CAPACITY, PACKING, Tree, fill, join, packable, readable
from zoft.tasks.types import Encoded, Example, Row, Target
from zoft.weights.blocks import trainable_blocks
from zoft.weights.coverage import verify_coverage
from zoft.weights.perturbed import PerturbedWeights

FAR = 2**31


def made(kind: str, **overrides):
    """A random float32 model of ``kind`` whose logits are spread by more than 0.3 wherever the family allows it."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    own = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
    if "moe" in kind or kind == "mixtral":
        sizes |= experts | {"shared_expert_intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **sizes | own.get(kind, {}) | overrides)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


# -- trees and rows -----------------------------------------------------------------------------------------------


def row(choice: int, ids: tuple[int, ...], targets: int = 2) -> Row:
    return Row(ids, (Target(choice, tuple(range(len(ids) - targets, len(ids))), (90 + choice,) * targets),))


def test_choices_stand_behind_what_they_share():
    """The prompt, and the beginnings of the choices as far as they are one."""
    (tree,) = join([row(0, (1, 2, 3, 4)), row(1, (1, 2, 3, 5, 6)), row(2, (1, 2, 3), targets=1)])
    assert tree.ids == (1, 2, 3, 4, 5, 6)
    assert tree.positions == (0, 1, 2, 3, 3, 4)
    assert tree.branches == (0, 0, 0, 1, 2, 2)
    assert [target.positions for target in tree.targets] == [(2, 3), (4, 5), (2,)]
    assert [target.choice for target in tree.targets] == [0, 1, 2]
    assert tree.rows == 3
    assert join([row(0, (1, 2))]) == [Tree.of(row(0, (1, 2)))]


def test_many_long_choices_are_several_trees():
    """Attention grows with the square of the length, so a tree does not."""
    rows = [row(i, (1, 2, 3, *[10 + i] * 200)) for i in range(7)]
    trees = join(rows)
    assert [tree.rows for tree in trees] == [2, 2, 2, 1]
    assert max(len(tree.ids) for tree in trees) <= 512
    assert [target.choice for tree in trees for target in tree.targets] == list(range(7))
    assert all(tree.ids[:3] == (1, 2, 3) for tree in trees)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_rows_are_filled_without_overlap(lengths):
    places = fill(lengths)
    capacity = -(-max(lengths) // CAPACITY) * CAPACITY
    taken = {}
    for (row, start), length in zip(places, lengths, strict=True):
        for place in range(start, start + length):
            assert place < capacity and taken.setdefault((row, place), len(taken)) == len(taken) - 1
    rows = 1 + max(row for row, _ in places)
    assert rows <= len(lengths) and (rows == 1 or rows < 2 * sum(lengths) / capacity + 1)
    assert fill(lengths) == places


def test_a_token_reads_its_branch_and_what_is_shared():
    tree, branch = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]]), torch.tensor([[0, 0, 1, 1, 2, 0, 1, 0]])
    seen = readable(tree, branch)
    assert seen.shape == (1, 1, 8, 8)
    reads = [line.nonzero().flatten().tolist() for line in seen[0, 0]]
    assert reads == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6], [7]]


def test_less_is_read_and_nothing_is_lost(encode):
    encoded = encode("classification", EXAMPLES + ONE_TOKEN)
    packed, plain = (collate(encoded, 0, "cpu", packable=limit) for limit in (FAR, 0))
    assert packed.rows.input_ids.numel() < 0.5 * plain.rows.input_ids.numel()
    assert packed.tokens < plain.tokens == sum(one.tokens for one in encoded)
    assert packed.rows.attention_mask.ndim == 4 and plain.rows.attention_mask.ndim == 2
    for name in ("example", "column", "gold"):
        assert torch.equal(getattr(packed, name), getattr(plain, name))
    for name in ("token", "segment", "place", "counts"):
        assert torch.equal(getattr(packed.rows, name), getattr(plain.rows, name))


# -- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(PACKING))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_architecture_that_is_packed_scores_as_in_plain_rows(kind, attention, encode):
    model = made(kind)
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{kind} has no {attention} attention")
    encoded = encode("classification", EXAMPLES + ONE_TOKEN)
    batch = collate(encoded, 0, "cpu", step=8, packable=packable(model))
    assert batch.rows.attention_mask.ndim == 4
    with torch.no_grad():
        sums, _ = choice_sums(model, batch.rows)
    rows = [row for one in encoded for row in one.rows]
    expected = [reference_log_probs(model, row, target).double().sum() for row in rows for target in row.targets]
    torch.testing.assert_close(sums, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text", "gpt2"])
def test_loss_and_gradient_are_those_of_one_plain_row_a_choice(family, encode, tokenizer):
    model = made(family)
    task = make_task("classification")
    found = loss(model, task, collate(encode(task, EXAMPLES), 0, "cpu", packable=packable(model)))
    gradients = torch.autograd.grad(found.value, [*model.parameters()])
    losses = []
    for example in EXAMPLES:
        means = []
        for choice in example.choices:
            prompt, full = (tokenizer(text)["input_ids"] for text in (example.prompt, example.prompt + choice))
            steps = torch.log_softmax(model(input_ids=torch.tensor([full])).logits[0, len(prompt) - 1 : -1], -1)
            means.append(steps.gather(1, torch.tensor(full[len(prompt) :])[:, None]).mean())
        losses.append(torch.nn.functional.cross_entropy(torch.stack(means)[None], torch.tensor([example.label])))
    expected = torch.stack(losses).mean()
    assert found.value.item() == pytest.approx(expected.item(), abs=1e-5)
    for ours, plain in zip(gradients, torch.autograd.grad(expected, [*model.parameters()]), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text", "gpt2"])
def test_perturbation_on_use_reaches_packed_rows(family, encode):
    """Losses at theta + eps u, on use and in place; and the check that every run begins with."""
    model, task = made(family), make_task("classification")
    blocks, direction = trainable_blocks(model), NoiseDirection(0, 0)
    encoded = encode(task, EXAMPLES)

    def closure() -> float:
        return loss(model, task, collate(encoded, 0, "cpu", packable=packable(model))).value.item()

    assert verify_coverage(blocks, closure) is None
    with torch.no_grad():
        before = closure()
        with PerturbedWeights(blocks, direction, 1e-2):
            on_use = closure()
        for block in blocks:
            block.parameter.add_(direction.values(block), alpha=1e-2)
        assert on_use == pytest.approx(closure(), abs=1e-5)
        assert abs(on_use - before) > 1e-3


def test_an_objective_has_the_same_bits_at_every_call(encode):
    """Also after other batches: where a tree is placed is a function of the batch alone."""
    model, task = made("llama"), make_task("classification")
    encoded = encode(task, EXAMPLES + ONE_TOKEN)
    with torch.no_grad():
        values = []
        for part in (encoded, encoded[:2], encoded, encoded[::-1], encoded):
            values.append(loss(model, task, collate(part, 0, "cpu", packable=FAR)).value.item())
    assert values[0] == values[2] == values[4] != values[1]
    assert values[3] == pytest.approx(values[0], abs=1e-6)


@pytest.mark.parametrize("kind", ["classification", "choice", "generation", "text"])
def test_evaluation_packs_and_scores_the_same(kind, encode, tokenizer):
    examples = {
        "generation": [Example(e.prompt, e.choices[:1], answers=("great",)) for e in EXAMPLES],
        "text": [Example("", (e.full_text(0),)) for e in EXAMPLES],
    }.get(kind, EXAMPLES)
    model = made("llama")
    task = make_task(kind, scores={"f1": lambda text, answers: 0.0}, max_new_tokens=2)
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].ndim), with_kwargs=True
    )
    found = evaluate(model, tokenizer, task, encode(task, examples), batch_size=3, generating=False)
    model.config.model_type = "unheard-of"
    plain = evaluate(model, tokenizer, task, encode(task, examples), batch_size=3, generating=False)
    assert set(seen) == {4, 2}
    assert found.loss == pytest.approx(plain.loss, abs=1e-6)
    assert found.predictions == plain.predictions and found.tokens == plain.tokens


def test_texts_share_rows_and_positions_with_gaps_stay(encode):
    model, task = made("qwen2"), make_task("text")
    rows = [Row((5, 6, 7, 8, 9), (Target(0, (0, 3, 4), (6, 9, 11)),)), Row((5, 6), (Target(0, (1,), (4,)),))]
    encoded = [Encoded(Example("", ("x",)), (r,), (r,)) for r in rows]
    batch = collate(encoded, 0, "cpu", packable=FAR)
    assert batch.rows.input_ids.shape == (1, 7)  # different examples share a row, but not what they have in common
    expected = torch.cat([reference_log_probs(model, r, r.targets[0]) for r in rows])
    with torch.no_grad():
        torch.testing.assert_close(target_log_probs(model, batch.rows), expected, atol=1e-5, rtol=0)
    assert loss(model, task, batch).weight == 4


# -- what is not packed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_rows_longer_than_a_sliding_window_are_plain(family, encode, tokenizer):
    model = made(family, sliding_window=8)
    assert packable(model) == 8
    task = make_task("classification")
    encoded = encode(task, EXAMPLES)
    longest = [max(len(row.ids) for row in one.rows) for one in encoded]
    assert max(longest) > 8 > min(longest)
    assert collate(encoded, 0, "cpu", packable=8).rows.attention_mask.ndim == 2
    assert collate([encoded[longest.index(min(longest))]], 0, "cpu", packable=8).rows.attention_mask.ndim == 4
    expected = [
        torch.nn.functional.cross_entropy(plain_scores(model, tokenizer, e)[None], torch.tensor([e.label]))
        for e in EXAMPLES
    ]
    found = evaluate(model, tokenizer, task, encoded, batch_size=3)
    assert found.loss == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}),  # ALiBi
        ("mamba", {"state_size": 8}),
        ("gptj", {"n_head": 4, "n_layer": 2, "n_embd": 32, "rotary_dim": 8, "n_positions": 64}),
    ],
)
def test_other_architectures_read_plain_rows(kind, sizes, encode):
    model = made(kind, **sizes)
    assert packable(model) == 0
    rows = [row for one in encode("classification", EXAMPLES) for row in one.rows]
    if kind == "mamba":  # its state runs over the padding, too: only rows of one length are exact
        rows = [row for row in rows if len(row.ids) == len(rows[0].ids)]
    with torch.no_grad():
        found = target_log_probs(model, pad(rows, 0, "cpu"))
    expected = torch.cat([reference_log_probs(model, row, target) for row in rows for target in row.targets])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_adapters_are_packed_unless_they_read_tokens_of_their_own(tiny_model, encode):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    encoded = encode("classification", EXAMPLES)
    assert packable(lora) == FAR
    task = make_task("classification")
    with torch.no_grad():
        packed, plain = (loss(lora, task, collate(encoded, 0, "cpu", packable=limit)).value for limit in (FAR, 0))
    assert packed.item() == pytest.approx(plain.item(), abs=1e-6)
    prompt = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert packable(prompt) == 0
    assert packable(torch.nn.Linear(2, 2)) == 0


# -- logits -------------------------------------------------------------------------------------------------------


def test_softcapping_and_scaling_of_logits_are_kept(encode):
    """Gemma 2 caps its logits, Cohere and Granite scale them: both happen after the head."""
    for kind, setting in (
        ("gemma2", "final_logit_softcapping"),
        ("cohere", "logit_scale"),
        ("granite", "logits_scaling"),
    ):
        scores = []
        for value in (0.5, 4.0):
            model = made(kind, **{setting: value})
            encoded = encode("classification", EXAMPLES)
            rows = [row for one in encoded for row in one.rows]
            with torch.no_grad():
                scores.append(choice_sums(model, collate(encoded, 0, "cpu", packable=FAR).rows)[0])
            plain = [reference_log_probs(model, row, row.targets[0]).double().sum() for row in rows]
            torch.testing.assert_close(scores[-1], torch.stack(plain), atol=1e-5, rtol=0)
        assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_the_head_reads_each_place_once(encode):
    """Nine choices of three examples that begin alike are predicted from one place an example."""
    model, shapes = made("llama"), []
    model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    examples = [Example(prompt, (" was", " the", " great"), 0) for prompt in ("the film. It", "Anna", "the plot. It")]
    encoded = encode("classification", examples)
    with torch.no_grad():
        for limit, step in ((FAR, 1), (0, 1), (FAR, 8)):
            loss(model, make_task("classification"), collate(encoded, 0, "cpu", step=step, packable=limit))
    assert shapes == [(1, 3, 320), (1, 3, 320), (1, 8, 320)]
