"""The signal benchmark: the bound against a search, and its report of a real model."""

import pytest
import torch

pytest.importorskip("benchmarks", reason="the installed package comes without its benchmarks")

from benchmarks.signal.bound import Groups, best_rate, best_single, gain
from benchmarks.signal.measure import Signal, measure
from benchmarks.signal.report import report
from zoft import tasks
from zoft.model.load import load
from zoft.weights.blocks import trainable_blocks

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


def test_a_report_names_every_kind_and_point(stories260k, shared) -> None:
    loaded = load(stories260k, dtype="fp32", device="cpu")
    prepared = tasks.prepare(
        "copa", shared / "data", loaded.tokenizer, context_length=512, splits=("train",), train_size=20
    )
    blocks = trainable_blocks(loaded.model)
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
