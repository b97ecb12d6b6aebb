"""The exact head: its gradient against autograd through the whole model, its steps, records and state."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from tests.conftest import MASKED, tiny_config
from tests.optim.test_contract import TABLE, make
from tests.tasks.conftest import make_task
from zoft.errors import ConfigError, ModelError, RunError
from zoft.optim import ExactHead, FullObjective, ProjectionRecord, StepRecord, ZOOptimizer, get_method
from zoft.optim.core.head import HeadMeter, head_of, with_norm
from zoft.tasks import objective
from zoft.tasks.encode import Encoder
from zoft.tasks.losses import BatchLoss, losses_of
from zoft.tasks.packing import packable
from zoft.tasks.types import Encoded, Example
from zoft.weights.blocks import trainable_blocks
from zoft.weights.vectors import install_fp32_vectors

EXAMPLES = [
    Example("the film It was", (" great and lovely", " terrible", " worse maybe"), 1),
    Example("Anna got a new toy. She was very very happy. It", (" was great", " was terrible film", " is"), 0),
    Example("It", (" was", " likes it"), 1),
    Example("the film was great. It", (" was", " the"), 1),
    Example("Anna", (" was", " the"), 0),
]
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256, "n_inner": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
}
CAUSAL = ("llama", "opt", "qwen2", "gpt_neox", *MORE)


def made(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose norms and biases are not at their initial ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family in MORE:
            config = AutoConfig.for_model(family, **SIZES | MORE[family])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            auto: Any = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
            model = auto.from_config(tiny_config(family), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def untied(model: Any) -> Any:
    """A copy of ``model`` whose head is a matrix of its own, so that its gradient is that of the output side."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def encoded_of(kind: str, tokenizer: Any) -> list[Encoded]:
    encoder = Encoder(tokenizer, make_task(kind), 256)
    examples = EXAMPLES if kind != "generation" else [Example(one.prompt, one.choices[:1]) for one in EXAMPLES]
    return [encoder.encode(example) for example in examples]


def batch_loss(kind: str, model: Any, tokenizer: Any, count: int = 1) -> BatchLoss:
    """The training loss of a task of ``kind`` on all examples, in ``count`` micro-batches."""
    found, encoded = objective("loss", make_task(kind), tokenizer, batch_size=8), encoded_of(kind, tokenizer)
    return BatchLoss(lambda: losses_of(found, model, encoded, count))


def measured(model: Any, closure: Callable[[], Any], rows: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The gradient of the head by the names of its blocks."""
    blocks = trainable_blocks(model)
    head = with_norm(head_of(model, blocks), model, blocks, closure)
    assert head.norm is not None
    meter = HeadMeter(model, head, rows)
    meter(closure)
    gradient = meter.gradient()
    count = head.weight.shape[0] if rows is None else len(rows)
    return {head.weight.name: gradient.of_rows(0, count), **gradient.vectors}


def reference(model: Any, closure_of: Callable[[Any], BatchLoss], names: Any) -> dict[str, torch.Tensor]:
    """The gradient by autograd through the whole model."""
    other = untied(model)
    parts = list(closure_of(other).parts())
    sum(total for total, _ in parts).backward()  # in float32 somewhere: log-probabilities are
    weight = sum(weight for _, weight in parts)
    parameters = dict(other.named_parameters())
    tied = {id(p): name for name, p in model.named_parameters()}[id(model.get_output_embeddings().weight)]
    head = other.get_output_embeddings().weight
    return {name: (head if name == tied else parameters[name]).grad / weight for name in names}


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name].double(), atol=1e-10, rtol=1e-10)
        assert gradient.abs().max() > 1e-6, name


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("kind", ["classification", "choice", "generation"])
def test_the_gradient_is_that_of_autograd_through_the_whole_model(family: str, kind: str, tokenizer) -> None:
    """Of head, bias and final norm; packed rows or plain ones, a batch whole or in micro-batches."""
    model = made(family)
    for count in (1, 3):
        found = measured(model, batch_loss(kind, model, tokenizer, count))
        agree(found, reference(model, lambda other, n=count: batch_loss(kind, other, tokenizer, n), found))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_cases_differ_as_they_should(tokenizer) -> None:
    """Packed and plain rows, tied and untied heads, a bias: each is there."""
    models = {family: made(family) for family in CAUSAL}
    tied = {f for f, m in models.items() if m.get_output_embeddings().weight is m.get_input_embeddings().weight}
    assert {"opt", "qwen2", "gpt2", "gemma2"} <= tied and not {"llama", "gpt_neox", "gptj"} & tied
    assert {bool(packable(model)) for model in models.values()} == {True, False}
    assert models["gptj"].get_output_embeddings().bias is not None


@pytest.mark.parametrize("family", MASKED)
def test_the_gradient_of_a_masked_model(family: str, tokenizer) -> None:
    """Its head reads a transform with a norm, and has a bias."""
    ids = torch.arange(10, 34).view(4, 6)

    def closure_of(model: Any) -> BatchLoss:
        def parts() -> Iterator[Any]:
            for part in (ids[:3], ids[3:]):
                logits = model(part).logits[:, 2]
                total = torch.nn.functional.cross_entropy(logits.double(), part[:, 2], reduction="sum")
                yield type("Part", (), {"total": total, "weight": len(part)})

        return BatchLoss(parts)

    model = made(family)
    found = measured(model, closure_of(model))
    assert len(found) == 4  # weight, bias, and both of the norm
    agree(found, reference(model, closure_of, found))
    head, rows = model.get_output_embeddings(), torch.tensor([4, 9])
    some = measured(model, closure_of(model), rows)
    for name, parameter in model.named_parameters():
        if parameter is head.weight or parameter is head.bias:
            torch.testing.assert_close(some[name], found[name][rows], atol=1e-14, rtol=1e-12)


def test_only_the_rows_that_are_asked_for_are_kept(tokenizer) -> None:
    model = made("llama")
    rows = torch.tensor(sorted({t for one in encoded_of("classification", tokenizer) for row in one.loss_rows
                                for target in row.targets for t in target.tokens}))  # fmt: skip
    closure = batch_loss("classification", model, tokenizer)
    every, some = measured(model, closure), measured(model, closure, rows)
    torch.testing.assert_close(some["lm_head.weight"], every["lm_head.weight"][rows], atol=1e-14, rtol=1e-12)
    assert torch.equal(some["model.norm.weight"], every["model.norm.weight"])


def test_a_gradient_of_many_positions_becomes_a_matrix(tokenizer) -> None:
    """Factors are kept while they are fewer than the columns of the head; the result is the same."""
    model, ids = made("llama"), torch.arange(240).view(2, 120) % 300 + 3

    def closure(of: Any = model) -> torch.Tensor:
        return of(ids, labels=ids).loss

    found = measured(model, closure)
    other = untied(model)
    closure(other).backward()
    torch.testing.assert_close(found["lm_head.weight"], other.lm_head.weight.grad, atol=1e-10, rtol=1e-10)


def test_the_mean_of_both_ends_differs_by_the_square_of_eps(tokenizer) -> None:
    model = made("llama")
    closure = batch_loss("choice", model, tokenizer)
    exact = measured(model, closure)["lm_head.weight"]
    off = []
    for eps in (4e-3, 2e-3):
        optimizer = ZOOptimizer(model, lr=0.0, eps=eps, exact=ExactHead(model=model))
        optimizer.measure(closure)
        _, gradient = optimizer.scratch["gradient"]
        off.append(float((gradient.of_rows(0, 320) - exact).norm()))
    assert off[0] > 1e-8 and off[0] / off[1] == pytest.approx(4, rel=0.1)


def test_methods_that_evaluate_at_theta_have_the_gradient_there(tokenizer) -> None:
    model = made("llama")
    closure = batch_loss("choice", model, tokenizer)
    exact = measured(model, closure)
    for name in ("hizoo", "fzoo", "zo-conservative"):
        optimizer = get_method(name).make(model, eps=1e-1, exact=ExactHead(model=model))
        optimizer.measure(closure)
        _, gradient = optimizer.scratch["gradient"]
        assert torch.equal(gradient.of_rows(0, 320), exact["lm_head.weight"]), name


# -- steps --------------------------------------------------------------------------------------------------------

IDS = torch.arange(3, 27).view(2, 12)
ANSWERS = (5, 9, 17)


class Run:
    """Steps of a tiny model with the exact head; half precision, tied weights."""

    def __init__(self, method: str = "mezo", rows: tuple[int, ...] | None = ANSWERS, **settings: Any) -> None:
        self.model = made("qwen2", torch.bfloat16)
        install_fp32_vectors(self.model)
        self.records: list[Any] = []
        exact = ExactHead(model=self.model, rows=rows, momentum=settings.pop("momentum", None))
        given = {
            "lr": 1e-3,
            "eps": 1e-2,
            "seed": 5,
            "weight_decay": 0.1,
            "journal": self.records.append,
            "exact": exact,
        }
        self.optimizer: Any = get_method(method).make(self.model, **given | settings)
        self.step = self.called = 0

    def loss(self) -> torch.Tensor:
        self.called += 1
        ids = (IDS + self.step) % 300 + 3
        logits = self.model(ids).logits[:, -1].double()
        return torch.nn.functional.cross_entropy(logits[:, list(ANSWERS)], ids[:, 0] % 3)

    def take(self, steps: int) -> "Run":
        for _ in range(steps):
            self.optimizer.step(self.loss)
            self.step += 1
        return self


def same(a: Run, b: Run) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


SETTINGS = pytest.mark.parametrize("settings", [{}, {"body": "frozen"}, {"body": "frozen", "momentum": 0.0}])


@SETTINGS
def test_records_replay_bit_for_bit(settings: dict[str, Any]) -> None:
    run, replayed = Run(**settings).take(6), Run(**settings, lr=0.0)
    assert not same(run, replayed)
    for record in run.records:
        assert len(record.exact["model.embed_tokens.weight"]) == 3 * 32 * 4
        replayed.optimizer.apply(record)
    assert same(run, replayed) and replayed.called == 0


@SETTINGS
@pytest.mark.parametrize("rows", [ANSWERS, None])
def test_a_state_goes_on(settings: dict[str, Any], rows: Any) -> None:
    unbroken, first, second = (Run(rows=rows, **settings).take(steps) for steps in (6, 4, 0))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step = 4
    assert same(second.take(2), unbroken)


def test_a_gradient_too_large_for_a_record_is_measured_again() -> None:
    run, replayed = Run(rows=None).take(3), Run(rows=None)
    assert run.optimizer.needs_gradient and not run.records[0].exact
    with pytest.raises(RunError, match="step 0: its record holds no gradient of the head; measure the step again"):
        replayed.optimizer.apply(run.records[0])
    for record in run.records:
        assert replayed.optimizer.measure(replayed.loss) == record
        replayed.optimizer.apply(record)
        replayed.step += 1
    assert same(run, replayed)


def test_what_moves() -> None:
    """With a frozen body three rows and the norm; else the body, too, and no other row of the tied embedding."""
    for body in ("zo", "frozen"):
        run = Run(body=body, weight_decay=0.0)
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.take(2)
        moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
        assert ("model.layers.0.mlp.up_proj.weight" in moved) == (body == "zo")
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= moved
        rows = (run.model.model.embed_tokens.weight != before["model.embed_tokens.weight"]).any(dim=1)
        assert tuple(rows.nonzero().flatten().tolist()) == ANSWERS
        assert [record.forwards for record in run.records] == [2 if body == "zo" else 1] * 2


def test_a_frozen_body_is_learned_on() -> None:
    run = Run(body="frozen").take(1)
    start = run.records[0].loss
    for _ in range(60):
        run.step = 0
        run.optimizer.step(run.loss)
    assert run.records[-1].loss < 0.7 * start


@pytest.mark.parametrize("momentum", [None, 0.0, 0.5])
@pytest.mark.parametrize("by_weight", [None, False])
def test_the_rule(momentum: float | None, by_weight: bool | None) -> None:
    """Against plain tensors, in float64: Adam by default, or one second moment a row."""
    model = made("llama")
    exact = ExactHead(model=model, rows=(4, 6), lr=0.1, momentum=momentum, by_weight=by_weight)
    optimizer = ZOOptimizer(model, lr=0.0, eps=1e-3, exact=exact, body="frozen", weight_decay=0.5)
    theta = model.lm_head.weight.detach().clone()[[4, 6]]
    m = v = torch.zeros(2, 32, dtype=torch.float64)
    beta = 0.9 if momentum is None else momentum
    for step in range(1, 4):
        record = optimizer.measure(lambda: model(IDS, labels=IDS).loss)
        g = torch.frombuffer(bytearray(record.exact["lm_head.weight"]), dtype=torch.float32).view(2, 32).double()
        m = beta * m + (1 - beta) * g
        v = 0.98 * v + 0.02 * (g.square().mean(dim=1, keepdim=True) if by_weight is False else g.square())
        step_size = m / (1 - beta**step) / ((v / (1 - 0.98**step)).sqrt() + 1e-8)
        theta = theta * (1 - 0.1 * 0.5) - 0.1 * step_size
        optimizer.apply(record)
        torch.testing.assert_close(model.lm_head.weight.detach()[[4, 6]], theta)


def test_the_state_is_small() -> None:
    """One number a row where all rows move (and one a weight of the norm); two a weight of few rows."""
    for rows, expected in ((None, 320 + 32), (ANSWERS, 2 * (3 * 32 + 32))):
        run = Run(body="frozen", rows=rows).take(1)
        assert sum(t.numel() for state in run.optimizer.state.values() for t in state.values()) == expected


# -- with every method -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_every_method_takes_the_head(name: str) -> None:
    """Records replay to the same bits, no direction moves the head, and forwards are what the method takes."""
    runs = []
    for live in (True, False):
        run = Run()
        exact = ExactHead(model=run.model, rows=ANSWERS)
        settings = {"journal": run.records.append, "weight_decay": 0.1, "live": live, "exact": exact}
        run.optimizer = make(name, run.model, run.loss, **settings)
        runs.append(run)
    run, replayed = runs
    before = run.model.model.embed_tokens.weight.detach().clone()
    run.optimizer.verify(run.loss)
    run.called = 0
    run.optimizer.full = FullObjective(run.loss, 1)
    run.take(5)
    for record in run.records:
        replayed.optimizer.apply(record)
    assert same(run, replayed) and replayed.called == 0
    rows = (run.model.model.embed_tokens.weight != before).any(dim=1)
    assert tuple(rows.nonzero().flatten().tolist()) == ANSWERS
    backward = 2 * 2 * sum(isinstance(r, ProjectionRecord) for r in run.records) if "dizo-fo" in name else 0
    assert sum(record.forwards for record in run.records) == run.called + backward


def test_a_tuner_normalises_over_what_is_probed() -> None:
    """``sum d_i s_i^2 = sum d_i`` over the blocks that directions perturb."""
    run = Run()
    run.optimizer = make("zoft", run.model, run.loss, exact=ExactHead(model=run.model, rows=ANSWERS))
    scales = dict(zip((b.name for b in run.optimizer.blocks), run.optimizer.measure(run.loss).scales, strict=True))
    blocks = run.optimizer.probed
    assert len(blocks) == len(run.optimizer.blocks) - 2
    total = sum(block.size * scales[block.name] ** 2 for block in blocks)
    assert total == pytest.approx(sum(block.size for block in blocks), rel=1e-5)


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_an_objective_without_a_gradient_is_refused() -> None:
    run = Run()
    with pytest.raises(ConfigError, match="this objective gives a number that has none: minimise the loss, or take"):
        run.optimizer.measure(lambda: run.loss().item())


def test_a_head_that_is_not_there_or_not_trained() -> None:
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="Linear has no output embedding"):
        ZOOptimizer(plain, lr=1, eps=1, exact=ExactHead(model=plain))
    model = made("llama")
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="the head of this model is not trained"):
        ZOOptimizer(model, lr=1, eps=1, exact=ExactHead(model=model))
    model = made("llama")
    with pytest.raises(ModelError, match=r"the head has rows 0 to 319, and rows 3 \.\. 320 are to move"):
        ZOOptimizer(model, lr=1, eps=1, exact=ExactHead(model=model, rows=(3, 320)))
    with pytest.raises(ConfigError, match="body is frozen and nothing is exact"):
        ZOOptimizer(model, lr=1, eps=1, body="frozen")
    optimizer = ZOOptimizer(model, lr=1, eps=1, exact=ExactHead(model=model), body="frozen")
    with pytest.raises(ModelError, match=r"does not read lm_head\.weight as the weight of a linear layer"):
        optimizer.measure(lambda: model.model(IDS)[0].sum())


def test_a_step_that_is_not_finite_is_skipped() -> None:
    run = Run(body="frozen")
    before = copy.deepcopy(run.model.state_dict())
    run.optimizer.step(lambda: run.loss() * float("nan"))
    assert isinstance(run.records[0], StepRecord) and run.records[0].skipped
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    run.take(1)
    assert not run.records[1].skipped
