"""The naive step is MeZO's formula, and every part of a step is timed on any model."""

import copy

import pytest
import torch

from benchmarks.step.measure import naive_step, ratios
from zoft.optim import MeZO, StepRecord


def test_the_naive_step_follows_the_formula() -> None:
    weights = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    expected = weights.detach().clone()
    updates = []
    for probe in (4, 5):
        z = torch.randn(5, generator=torch.Generator().manual_seed(probe), dtype=torch.float64)
        updates.append(z * ((expected + 0.1 * z).square().sum() - (expected - 0.1 * z).square().sum()) / 0.2)
    with torch.no_grad():
        naive_step([weights], lambda: weights.square().sum(), lr=0.01, eps=0.1, seed=4, probes=2)
    torch.testing.assert_close(weights.detach(), expected - 0.01 * sum(updates) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_is_timed(dtype: torch.dtype, tiny_model) -> None:
    model = tiny_model("llama", dtype=dtype)
    found = ratios(model, batch=2, length=8, rounds=1, probes=2)
    assert found["ratio"] == pytest.approx(found["ratio_measure"] + found["ratio_update"])
    assert all(found[name] > 0 for name in found if name != "ratio_tuner")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
def test_graphs_are_timed_on_a_gpu(tiny_model) -> None:
    found = ratios(tiny_model("llama").cuda(), batch=2, length=8, rounds=1)
    assert found["ratio_graphs"] > 0 and found["ratio_graphs_bare"] > 0


@pytest.mark.gpu
@torch.no_grad()
def test_records_of_a_gpu_move_the_weights_as_a_cpu_does(tiny_model) -> None:
    """The update alone: noise, arithmetic and rounding are the same to the bit on both kinds of device."""
    for dtype in (torch.float32, torch.bfloat16):
        here = tiny_model("llama", dtype=dtype)
        there = copy.deepcopy(here).cuda()
        for model in (here, there):
            record = StepRecord(0, 0, lr=(1e-3,), eps=1e-3, losses=((1.5, 1.25),))
            MeZO(model, lr=1e-3, eps=1e-3).apply(record)
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.equal(a, b.cpu())
