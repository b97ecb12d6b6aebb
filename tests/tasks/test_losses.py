"""Scores and losses against plain PyTorch on five families, one row at a time and without padding."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.conftest import FAMILIES
from tests.tasks.conftest import make_task
from zoft.tasks import collate, evaluate, loss
from zoft.tasks.batches import pad
from zoft.tasks.generate import generate
from zoft.tasks.logits import target_log_probs
from zoft.tasks.losses import choice_sums
from zoft.tasks.types import Encoded, Example, Row, Target, Weighted

EXAMPLES = [
    Example("the film It was", (" great and lovely", " terrible", " worse maybe"), 1),
    Example("Anna got a new toy. She was very very happy. It", (" was great", " was terrible film", " is"), 0),
    Example("It", (" was", " likes it"), 1),
]
ONE_TOKEN = [
    Example("the film was great. It", (" was", " the"), 1),
    Example("Anna", (" was", " the"), 0),
]


def reference_log_probs(model, row: Row, target: Target) -> torch.Tensor:
    """Log-probabilities from one unpadded forward pass of the whole row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].float()
    return torch.log_softmax(logits, -1)[list(target.positions), list(target.tokens)]


def plain_scores(model, tokenizer, example: Example) -> torch.Tensor:
    """Mean log-probability of every choice, each from a plain row of its own, in float64."""
    means = []
    for choice in example.choices:
        prompt, full = (tokenizer(text)["input_ids"] for text in (example.prompt, example.prompt + choice))
        assert full[: len(prompt)] == prompt
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([full])).logits[0].double()
        steps = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        means.append(steps.gather(1, torch.tensor(full[len(prompt) :])[:, None]).mean())
    return torch.stack(means)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_does_not_change_scores(family, tiny_model, encode):
    model = tiny_model(family)
    rows = [row for one in encode("classification", EXAMPLES + ONE_TOKEN) for row in one.rows]
    with torch.no_grad():
        together = target_log_probs(model, pad(rows, 0, "cpu"))
    alone = torch.cat([reference_log_probs(model, row, target) for row in rows for target in row.targets])
    assert len({len(row.ids) for row in rows}) > 2
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_left_padding_does_not_shift_absolute_positions(encode):
    """GPT-2 counts positions from the left edge of the batch unless it is given them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    rows = [row for one in encode("classification", EXAMPLES) for row in one.rows]
    with torch.no_grad():
        together = target_log_probs(model, pad(rows, 0, "cpu"))
    alone = torch.cat([reference_log_probs(model, row, target) for row in rows for target in row.targets])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_shared_row_scores_as_one_row_a_choice(family, tiny_model, encode, tokenizer):
    model = tiny_model(family)
    encoded = encode("classification", ONE_TOKEN)
    assert [len(one.rows) for one in encoded] == [1, 1]
    with torch.no_grad():
        sums, counts = choice_sums(model, collate(encoded, 0, "cpu").rows)
    expected = torch.cat([plain_scores(model, tokenizer, example) for example in ONE_TOKEN])
    torch.testing.assert_close(sums / counts, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_classification_loss_is_cross_entropy_of_mean_log_probs(family, tiny_model, encode, tokenizer):
    model = tiny_model(family)
    task = make_task("classification")
    found = loss(model, task, collate(encode(task, EXAMPLES), 0, "cpu"))
    expected = [
        torch.nn.functional.cross_entropy(plain_scores(model, tokenizer, e)[None], torch.tensor([e.label]))
        for e in EXAMPLES
    ]
    assert found.weight == 3
    assert found.total.dtype == torch.float64
    assert found.value.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["choice", "generation"])
def test_lm_loss_is_the_token_mean_of_the_gold_choice(kind, tiny_model, encode, tokenizer):
    model = tiny_model("llama")
    examples = [Example(e.prompt, (e.choices[e.label],)) for e in EXAMPLES] if kind == "generation" else EXAMPLES
    task = make_task(kind)
    found = loss(model, task, collate(encode(task, examples), 0, "cpu"))
    total, tokens = 0.0, 0
    for example in EXAMPLES:
        gold = example.choices[example.label]
        count = len(tokenizer(example.prompt + gold)["input_ids"]) - len(tokenizer(example.prompt)["input_ids"])
        total -= plain_scores(model, tokenizer, example)[example.label].item() * count
        tokens += count
    assert found.weight == tokens > len(EXAMPLES)
    assert found.value.item() == pytest.approx(total / tokens, abs=1e-5)


@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_micro_batches_average_exactly(kind, tiny_model, encode):
    model = tiny_model("llama", dtype=torch.float64)
    task = make_task(kind)
    encoded = encode(task, EXAMPLES)
    whole = loss(model, task, collate(encoded, 0, "cpu"))
    parts = [loss(model, task, collate(part, 0, "cpu")) for part in (encoded[:1], encoded[1:])]
    assert (parts[0] + parts[1]).value.item() == pytest.approx(whole.value.item(), abs=1e-6)
    assert (parts[0] + parts[1]).weight == whole.weight


@pytest.mark.parametrize("kind", ["classification", "choice", "generation", "text"])
def test_evaluation_reports_the_training_loss(kind, tiny_model, encode, tokenizer):
    examples = {
        "generation": [Example(e.prompt, e.choices[:1], answers=("great",)) for e in EXAMPLES],
        "text": [Example("", (e.full_text(0),)) for e in EXAMPLES],
    }.get(kind, EXAMPLES)
    model = tiny_model("qwen2")
    task = make_task(kind, scores={"f1": lambda text, answers: 0.0}, max_new_tokens=2)
    encoded = encode(task, examples)
    found = evaluate(model, tokenizer, task, encoded, batch_size=2)
    trained = loss(model, task, collate(encoded, 0, "cpu")).value.item()
    assert found.loss == pytest.approx(trained, abs=1e-5)


def test_the_loss_is_differentiable(tiny_model, encode):
    model = tiny_model("llama")
    task = make_task("classification")
    batch = collate(encode(task, EXAMPLES), 0, "cpu")
    loss(model, task, batch).value.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-3 * direction
            values.append(loss(model, task, batch).value.item())
            weight -= sign * 1e-3 * direction
    slope = (values[0] - values[1]) / 2e-3
    assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=2e-2, abs=1e-4)


def test_logits_are_upcast_before_the_softmax(tiny_model, encode):
    """In bf16 a log-softmax would be a multiple of 2**-8; upcast logits give a finer one."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        found = target_log_probs(model, collate(encode("classification", EXAMPLES), 0, "cpu").rows)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_a_model_without_logits_to_keep_scores_the_same(tiny_model, encode):
    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    model = tiny_model("llama")
    rows = collate(encode("classification", EXAMPLES), 0, "cpu").rows
    with torch.no_grad():
        torch.testing.assert_close(
            target_log_probs(Plain(model), rows), target_log_probs(model, rows), atol=1e-5, rtol=0
        )


def test_only_the_needed_logits_are_computed(tiny_model, encode):
    model = tiny_model("llama")
    shapes = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        loss(model, make_task("classification"), collate(encode("classification", ONE_TOKEN), 0, "cpu"))
    assert shapes == [(1, 2, 320)]


def test_positions_of_a_conversation_may_have_gaps(tiny_model):
    model = tiny_model("llama")
    row = Row((5, 6, 7, 8, 9), (Target(0, (0, 3, 4), (6, 9, 11)),))
    other = Row((5, 6), (Target(0, (1,), (4,)),))
    encoded = [Encoded(Example("", ("x",)), (r,), (r,)) for r in (row, other)]
    found = loss(model, make_task("text"), collate(encoded, 0, "cpu"))
    expected = torch.cat([reference_log_probs(model, r, r.targets[0]) for r in (row, other)])
    assert found.weight == 4
    assert found.value.item() == pytest.approx(-expected.mean().item(), abs=1e-5)


def test_weighted_adds_totals_and_weights():
    both = Weighted(torch.tensor(3.0), 2) + Weighted(torch.tensor(1.0), 6)
    assert (both.value.item(), both.weight) == (0.5, 8)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"num_local_experts": 4, "output_router_logits": True}),
        ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 32, "output_router_logits": True}),
        ("olmoe", {"num_experts": 4, "output_router_logits": True}),
        ("llama", {"output_hidden_states": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outputs_that_a_configuration_asks_for_change_no_score(family, settings, encode, tokenizer):
    """A balancing loss of the routers, for one, takes no packed mask, and is not part of a score."""
    common = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "intermediate_size": 64, "num_experts_per_tok": 2}
    off = {name: value for name, value in settings.items() if not name.startswith("output_")}
    configs = [AutoConfig.for_model(family, **common, **given) for given in (settings, off)]
    torch.manual_seed(0)
    asked = AutoModelForCausalLM.from_config(configs[0]).eval()
    plain = AutoModelForCausalLM.from_config(configs[1]).eval()
    plain.load_state_dict(asked.state_dict())
    encoded = encode("choice", EXAMPLES)
    found = [evaluate(model, tokenizer, make_task("choice"), encoded, batch_size=4) for model in (asked, plain)]
    assert found[0] == found[1]
    used = make_task("generation", scores={"f1": lambda *_: 0.0}, max_new_tokens=3)
    prompts = [
        one.prompt_ids for one in encode(used, [Example(text, (" x",), answers=("x",)) for text in ("It", "the film")])
    ]
    assert generate(asked, tokenizer, used, prompts) == generate(plain, tokenizer, used, prompts)
