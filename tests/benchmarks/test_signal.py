"""The signal benchmark: its estimators against sums over all labels, and the bound against a search."""

import pytest
import torch

pytest.importorskip("benchmarks", reason="the installed package comes without its benchmarks")

from benchmarks.signal.bound import Groups, best_rate, best_single, gain
from benchmarks.signal.measure import Signal, gradients, losses_of, measure, squared, unbiased
from benchmarks.signal.report import report
from zoft import models, tasks
from zoft.blocks import trainable_blocks
from zoft.tasks import collate, pad_id
from zoft.tasks.score import choice_sums

BATCH = 8


@pytest.fixture
def groups() -> Groups:
    generator = torch.Generator().manual_seed(3)
    signal, noise, fisher = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    return Groups(list("abcde"), torch.ones(5, dtype=torch.float64), signal, 20 * noise, fisher)


def test_the_gain_is_that_of_the_best_rate_on_a_grid(groups: Groups) -> None:
    weight = torch.tensor([0.1, 2.0, 1.0, 0.5, 0.3], dtype=torch.float64)

    def best_on_a_grid(w: torch.Tensor) -> float:
        rates = torch.logspace(-6, 2, 20001, dtype=torch.float64)
        a, d, c = w @ groups.signal, w @ (groups.signal + groups.noise / BATCH), w @ groups.fisher
        return float((rates * a - rates**2 * d * c / 2).max())

    expected = best_on_a_grid(weight) / best_on_a_grid(torch.ones_like(weight))
    assert gain(groups, weight, BATCH) == pytest.approx(expected, rel=1e-5)
    assert gain(groups, 7 * weight, BATCH) == pytest.approx(expected, rel=1e-5), "lengths do not matter"


def test_no_scales_gain_more_than_the_best_single_group(groups: Groups) -> None:
    name, bound = best_single(groups, BATCH)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5000, 5, generator=generator, dtype=torch.float64) ** 8
    found = max(gain(groups, weight, BATCH) for weight in weights)
    assert 0.8 * bound < found <= bound and name in groups.names
    assert bound > 1


def test_the_signal_is_unbiased_where_the_squared_mean_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 0.1 + torch.randn(4000, 8, generator=generator, dtype=torch.float64)  # mean 0.1, so |E g|^2 is 0.01
    estimates = unbiased(draws.sum(1).square(), draws.square().sum(1), 8)
    assert estimates.mean().item() == pytest.approx(0.01, abs=4 * estimates.std().item() / 4000**0.5)
    assert draws.mean(1).square().mean() > 0.1


def test_labels_drawn_from_the_model_have_the_trace_of_its_fisher_matrix(stories260k, shared) -> None:
    """Against the sum over the labels of every example, each weighted by its probability."""
    loaded, prepared, blocks = made_ready("vader_movie", stories260k, shared)
    examples = prepared.train[:2]
    expected = 0.0
    for one in examples:
        batch = collate([one], pad_id(loaded.tokenizer), "cpu")
        sums, counts = choice_sums(loaded.model, batch.rows)
        log_probs = (sums / counts).log_softmax(0)
        for log_prob in log_probs:
            expected += float(log_prob.detach().exp() * trace(blocks, log_prob)) / len(examples)
    generator = torch.Generator().manual_seed(0)
    batch = collate(examples, pad_id(loaded.tokenizer), "cpu")
    drawn = []
    for _ in range(100):
        loss, of_drawn, weight = losses_of(loaded.model, prepared.task, batch, generator)
        drawn.append(weight * trace(blocks, of_drawn))
    found = torch.tensor(drawn)
    error = float(found.std()) / len(found) ** 0.5
    assert error < 0.2 * expected
    assert float(found.mean()) == pytest.approx(expected, abs=4 * error)
    plain = tasks.objective("loss", prepared.task, loaded.tokenizer, batch_size=1)(loaded.model, examples)
    assert (loss.item(), weight) == (pytest.approx(plain.value.item(), rel=1e-6), 2)


def test_the_loss_of_text_is_drawn_over_the_vocabulary(stories260k, shared) -> None:
    """The mean loss of drawn tokens is the entropy, far from the loss of the gold ones."""
    loaded, prepared, _ = made_ready("copa", stories260k, shared)
    batch = collate(prepared.train[:4], pad_id(loaded.tokenizer), "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = [losses_of(loaded.model, prepared.task, batch, generator) for _ in range(50)]
        plain = tasks.objective("loss", prepared.task, loaded.tokenizer, batch_size=1)(loaded.model, prepared.train[:4])
        rows = batch.rows
        logits = loaded.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
        log_probs = logits[rows.row, rows.position].log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    loss, _, weight = draws[0]
    assert (float(loss), weight) == (pytest.approx(float(plain.value), rel=1e-6), plain.weight)
    of_drawn = torch.stack([drawn for _, drawn, _ in draws])
    assert float(of_drawn.mean()) == pytest.approx(float(entropy), abs=4 * float(of_drawn.std()) / 50**0.5)
    assert abs(float(entropy) - float(plain.value)) > 8 * float(of_drawn.std()) / 50**0.5


def made_ready(name: str, model, shared):
    loaded = models.load(model, dtype="fp32", device="cpu")
    prepared = tasks.prepare(
        name, shared / "data", loaded.tokenizer, context_length=512, splits=("train",), train_size=20
    )
    return loaded, prepared, trainable_blocks(loaded.model)


def trace(blocks, loss: torch.Tensor) -> float:
    """The squared length of the gradient."""
    total = []
    with gradients(blocks, lambda i, gradient: total.append(float(squared(gradient)))):
        loss.backward(retain_graph=True)
    return sum(total)


def test_a_report_names_every_kind_and_point(stories260k, shared) -> None:
    loaded, prepared, blocks = made_ready("copa", stories260k, shared)
    before = [block.parameter.detach().clone() for block in blocks]
    batches = [prepared.train[2 * k : 2 * k + 2] for k in range(8)]
    found = measure(loaded, blocks, prepared.task, batches, draws=2, seed=0)
    assert all(torch.equal(old, block.parameter) for old, block in zip(before, blocks, strict=True))
    # The four quarters are independent estimates of the same signal.
    parts = torch.tensor(found.signal_parts).sum(1)
    assert parts.shape == (4,)
    total = sum(found.signal)
    assert total == pytest.approx(float(parts.mean()), abs=3 * float(parts.std()))
    again = Signal(**vars(found))
    page = report({"copa +0": again}, 4)
    for kind in ("v_proj", "down_proj", "embed_tokens", "post_attention_layernorm"):
        assert f"| {kind} |" in page
    assert "copa +0: loss" in page and page.count("| copa +0 |") == 3


def test_mezos_best_rate() -> None:
    two = Groups(["a", "b"], *torch.tensor([[1.0, 1.0], [1.0, 1.0], [16.0, 0.0], [3.0, 5.0]]).double())
    assert best_rate(two, BATCH) == 2 / (4 * 8)
