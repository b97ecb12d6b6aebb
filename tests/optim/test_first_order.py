"""The first-order bounds: twins, half precision, records that replay nothing, resume, cost, what cannot work."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from zoft.deploy import FinetuneConfig, StepDone, finetune, replay
from zoft.errors import ConfigError, Interrupted, RunError
from zoft.optim import SGD, Adam, get_method
from zoft.tasks import Weighted
from zoft.tasks.losses import backward


def quadratic(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return torch.nn.Parameter(weights.to(dtype)), torch.linspace(0.5, 2, 5, dtype=torch.float64)


def closure_of(weights: torch.nn.Parameter, curvature: torch.Tensor):
    def closure() -> torch.Tensor:
        loss = (curvature * weights.double().square()).sum() / 2
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_torch_s(decay: float):
    (ours, curvature), (theirs, _) = quadratic(), quadratic()
    optimizer = Adam([ours], lr=0.03, weight_decay=decay)
    reference = torch.optim.AdamW([theirs], lr=0.03, weight_decay=decay)
    for _ in range(50):
        optimizer.step(closure_of(ours, curvature))
        reference.zero_grad()
        reference.step(closure_of(theirs, curvature))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_sgd_is_its_formula():
    weights, curvature = quadratic()
    expected = weights.detach() * (1 - 0.1 * curvature) ** 50
    optimizer = SGD([weights], lr=0.1)
    for _ in range(50):
        optimizer.step(closure_of(weights, curvature))
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-12, atol=1e-12)


def test_updates_that_bf16_would_lose_add_up_in_the_float32_copy():
    weights = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = SGD([weights], lr=1e-4)  # of a gradient of 1: far below the spacing of bf16 at 1, which is 2**-8
    for _ in range(1000):
        optimizer.step(lambda: (weights.float().sum().backward(), 0.0)[1])
    torch.testing.assert_close(weights.detach().float(), torch.full((64,), 0.9), rtol=0, atol=2**-8)


def test_a_record_moves_nothing_without_its_gradient():
    weights, curvature = quadratic()
    optimizer = SGD([weights], lr=0.1)
    record = optimizer.measure(closure_of(weights, curvature))
    assert not record.flat and record.extra["gradient"] == pytest.approx(float((curvature * weights.detach()).norm()))
    optimizer.apply(record)
    with pytest.raises(RunError, match="measure it again"):
        optimizer.apply(dataclasses.replace(record, step=1))
    with pytest.raises(ConfigError, match="probes nothing"):
        SGD([weights], lr=0.1, probes=2)


def test_a_loss_that_is_not_finite_moves_nothing():
    weights, curvature = quadratic()
    before = weights.detach().clone()
    SGD([weights], lr=0.1).step(lambda: closure_of(weights, curvature)() * torch.inf)
    assert torch.equal(weights, before)


def test_the_gradient_of_parts_is_that_of_the_whole():
    weights, _ = quadratic()
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def parts(*bounds: int):
        for low, high in itertools.pairwise(bounds):
            yield Weighted((rows[low:high] @ weights).tanh().sum(), high - low)

    whole = backward(parts(0, 8), [weights])
    gradient = weights.grad.clone()
    weights.grad = None
    assert backward(parts(0, 3, 7, 8), [weights]) == pytest.approx(whole, abs=1e-14)
    torch.testing.assert_close(weights.grad, gradient, rtol=0, atol=1e-14)


def test_a_backward_pass_counts_two_forwards():
    adam, mezo = get_method("adam"), get_method("mezo")
    assert [adam.forwards(1, 7), mezo.forwards(3, 7)] == [21, 42]
    assert [adam.steps_within(1, budget) for budget in (2, 3, 5, 6)] == [0, 1, 1, 2]
    assert [mezo.steps_within(3, budget) for budget in (5, 6, 11, 12)] == [0, 1, 1, 2]


# -- as deploy drives them --------------------------------------------------------------------------------------------


@pytest.fixture
def config(model_folder: Path, rows: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model_folder), data=rows, method="adam", steps=6, lr=3e-3, batch_size=8, eval_every=3,
        snapshot_every=2, out=tmp_path / "run",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_unbroken_one(config: FinetuneConfig, dtype: str, tmp_path: Path):
    config = config.model_copy(update={"dtype": dtype})
    whole = finetune(config)
    assert whole.forwards == 18 and whole.zero_slope_steps == 0 and whole.eval_loss < whole.eval_loss_start
    broken, seen = config.model_copy(update={"out": tmp_path / "broken"}), []
    with pytest.raises(Interrupted):
        finetune(broken, on_event=seen.append, cancelled=lambda: sum(isinstance(e, StepDone) for e in seen) >= 3)
    for file in (broken.out / "snapshots").glob("*3.safetensors"):
        file.unlink()  # as a kill between two snapshots leaves it: step 3 is in the journal alone
    resumed = finetune(broken, resume=True)
    told = {"seconds", "peak_memory_bytes", "out", "journal"}
    assert resumed.model_dump(exclude=told) == whole.model_dump(exclude=told)
    read = [(run / "model" / "model.safetensors").read_bytes() for run in (config.out, broken.out)]
    assert read[0] == read[1]


def test_accumulation_changes_memory_only(config: FinetuneConfig, tmp_path: Path):
    whole = finetune(config)
    parts = finetune(config.model_copy(update={"accumulate": 4, "out": tmp_path / "parts"}))
    assert parts.train_loss == pytest.approx(whole.train_loss, rel=1e-4)


def test_a_run_that_takes_gradients_says_so(config: FinetuneConfig, tmp_path: Path):
    finetune(config)
    card = (config.out / "model" / "README.md").read_text()
    assert "with gradients" in card and "zoft replay" not in card and "first-order" in card
    with pytest.raises(RunError, match="gradients are not in the journal"):
        replay(config.model, config.out, tmp_path / "copy")


def test_a_metric_has_no_gradient(config: FinetuneConfig):
    with pytest.raises(ConfigError, match="objective accuracy has no gradient"):
        finetune(config.model_copy(update={"objective": "accuracy"}))


def test_a_run_that_keeps_no_model_keeps_its_scores(config: FinetuneConfig, tmp_path: Path):
    kept = finetune(config)
    lean = config.model_copy(update={"keep_model": False, "out": tmp_path / "lean"})
    told = {"seconds", "peak_memory_bytes", "out", "journal"}
    assert finetune(lean).model_dump(exclude=told) == kept.model_dump(exclude=told)
    assert not (lean.out / "model").exists()
    (lean.out / "model").mkdir()  # a kill just before it was deleted
    finetune(lean, resume=True)
    assert not (lean.out / "model").exists()
