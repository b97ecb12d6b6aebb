"""Signal and Fisher trace of blocks: unbiased, against sums over all labels, and the scales made of them."""

import pytest
import torch

from zoft import tasks
from zoft.metatrain.gradient import gradients
from zoft.metatrain.signal import Signal, drawn_losses, measure_signal, signal_scales, squared, unbiased
from zoft.model.load import load
from zoft.tasks import collate, pad_id
from zoft.tasks.logits import needed_logits
from zoft.tasks.losses import choice_sums
from zoft.weights.blocks import Block, trainable_blocks


def made_ready(name: str, model, shared):
    loaded = load(model, dtype="fp32", device="cpu")
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
        loss, of_drawn, weight = drawn_losses(loaded.model, prepared.task, batch, generator)
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
        draws = [drawn_losses(loaded.model, prepared.task, batch, generator) for _ in range(50)]
        plain = tasks.objective("loss", prepared.task, loaded.tokenizer, batch_size=1)(loaded.model, prepared.train[:4])
        log_probs = needed_logits(loaded.model, batch.rows)[batch.rows.logit].log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1).mean()
    loss, _, weight = draws[0]
    assert (float(loss), weight) == (pytest.approx(float(plain.value), rel=1e-6), plain.weight)
    of_drawn = torch.stack([drawn for _, drawn, _ in draws])
    assert float(of_drawn.mean()) == pytest.approx(float(entropy), abs=4 * float(of_drawn.std()) / 50**0.5)
    assert abs(float(entropy) - float(plain.value)) > 8 * float(of_drawn.std()) / 50**0.5


def test_the_measurement_is_the_formula_of_its_docstring() -> None:
    """Linear losses have known gradients: every pair of different batches counts once."""
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    of_batches = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    of_drawn = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)

    def losses():
        for g, drawn, labels in zip(of_batches, of_drawn, (4, 2, 1), strict=True):
            yield (g * weight).sum(), (drawn * weight).sum(), labels

    found = measure_signal([Block("w", weight)], losses())
    pairs = [of_batches[a] @ of_batches[b] for a in range(3) for b in range(3) if a != b]
    assert found.signal.item() == pytest.approx(float(sum(pairs)) / 6)
    assert found.batch.item() == pytest.approx((5 + 10 + 2) / 3)
    assert found.fisher.item() == pytest.approx((4 * 1 + 2 * 4 + 1 * 9) / 3)
    assert weight.grad is None


def test_scales_are_the_ratio_of_the_kind() -> None:
    signal, fisher = torch.tensor([3.0, 5.0, 0.0, 2.0]), torch.tensor([1.0, 3.0, 4.0, 2.0])
    found = Signal(signal.double(), signal.double(), fisher.double())
    # Kind a: 8 / 4 = 2; b: -; c: 1; the whole: 10 / 10 = 1.
    assert signal_scales(found, ["a", "a", "b", "c"]).tolist() == pytest.approx([2.0, 2.0, 0.01, 1.0])
    silent = Signal(*torch.zeros(3, 2, dtype=torch.float64))
    assert signal_scales(silent, ["a", "b"]).tolist() == [1.0, 1.0]
