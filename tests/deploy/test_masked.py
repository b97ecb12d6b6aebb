"""Masked language models through the whole of stage two: runs, resuming, replay, tuners, few shots, mistakes."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.conftest import MASKED
from zoft.deploy import EvalConfig, FinetuneConfig, Warned, evaluate_model, finetune, replay
from zoft.deploy.journal import read_journal
from zoft.errors import ConfigError
from zoft.metatrain import MetatrainConfig, metatrain
from zoft.model.fingerprint import fingerprint
from zoft.optim import METHODS
from zoft.weights.blocks import trainable_blocks

from .conftest import same, stopped_at, with_, without_times

GOOD, BAD = ("great", "lovely", "happy"), ("terrible", "worse", "maybe")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """SST-2 in small: 96 rows of train, 24 of dev and of test; every third is bad."""
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    rows = [
        {"sentence": f"the {thing} was {(BAD if number % 3 == 0 else GOOD)[number % 2]} ", "label": int(number % 3 > 0)}
        for number, thing in enumerate(f"{kind} {i}" for i in range(18) for kind in ("film", "cast", "plot", "toy") * 2)
    ]
    for split, part in (("train", rows[:96]), ("dev", rows[96:120]), ("test", rows[120:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder.parent


@pytest.fixture
def config(masked_folder, films: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(masked_folder()),
        task="sst2",
        data=films,
        method="mezo",
        steps=8,
        lr=1e-3,
        batch_size=8,
        eval_every=4,
        out=tmp_path / "run",
    )


@pytest.mark.parametrize("family", MASKED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_is_an_ordinary_masked_checkpoint(config, masked_folder, tmp_path, family, dtype) -> None:
    """Its scores are those of `evaluate_model`, its journal gives its weights, and it is loaded as what it was."""
    config = with_(config, model=str(masked_folder(family) if family != "roberta" else config.model), dtype=dtype)
    result = finetune(config)
    scores = evaluate_model(EvalConfig(model=str(config.out / "model"), task="sst2", data=config.data, split="test"))
    assert (scores.eval_loss, scores.metric) == (result.test_loss, result.test_metric)
    assert replay(config.model, config.out, tmp_path / "again").verified
    written = json.loads((config.out / "model" / "config.json").read_text())
    assert written["architectures"] == json.loads((Path(config.model) / "config.json").read_text())["architectures"]
    assert fingerprint(config.out / "model").architecture_hash == fingerprint(config.model).architecture_hash


def test_it_learns(config) -> None:
    """Words that tell the classes apart, in a random model with gradients: only a loss at the right place can fall."""
    result = finetune(with_(config, method="adam", lr=3e-3, steps=60, eval_every=30))
    assert result.metric_start is not None and result.metric_start < 0.7
    assert result.metric == 1.0 and result.test_loss is not None and result.test_loss < 0.2


@pytest.mark.parametrize("method", ["mezo", "dizo", "lozo"])
def test_interrupted_and_resumed_equals_unbroken(config, tmp_path, method) -> None:
    changes = {"method": method, "dtype": "bf16", "shots": 6, "batch_size": 4}
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **changes))
    broken = with_(config, out=tmp_path / "broken", **changes)
    for stop in (2, 5):
        stopped_at(broken, stop, resume=True)
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", tmp_path / "broken")
    assert replay(broken.model, broken.out, tmp_path / "again").verified


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.tuned])
def test_every_method_runs(config, method) -> None:
    result = finetune(with_(config, method=method, probes=None, steps=2, eval_every=2, lr=1e-4, keep_model=False))
    assert result.steps == 2 and result.test_loss is not None


def test_a_tuner_is_learned_and_drives_a_run(config, tmp_path) -> None:
    card = tmp_path / "card.safetensors"
    metatrain(
        MetatrainConfig(
            model=config.model, tasks=("sst2",), data=config.data, steps=4, reset_every=2, evidence=8, out=card
        )
    )
    result = finetune(with_(config, method=None, tuner=str(card)))
    assert result.method == "zoft" and result.tuner is not None


@pytest.mark.parametrize("family", MASKED)
def test_tied_weights_are_one_block(tiny_model, family) -> None:
    model = tiny_model(family)
    shapes = [block.shape for block in trainable_blocks(model)]
    assert shapes.count((320, 32)) == 1  # embedding and decoder
    assert shapes.count((320,)) == 1  # bias of the decoder, which most classes hold twice
    assert len(shapes) < len(list(model.named_parameters(remove_duplicate=False)))


# -- few shots ----------------------------------------------------------------------------------------------------


def test_the_run_sees_so_many_rows_of_every_class(config) -> None:
    reported: list[str] = []
    seen = []

    def objective(model, examples):
        seen.extend(one.example for one in examples)
        return 0.0

    finetune(
        with_(config, shots=8, batch_size=4, steps=4, objective="custom"),
        objective=objective,
        on_event=lambda event: reported.append(event.message) if isinstance(event, Warned) else None,
    )
    trained = {one.prompt: one.label for one in seen}
    assert len(trained) == 16 and Counter(trained.values()) == {0: 8, 1: 8}


def test_shots_are_in_the_journal_and_decide_the_dev_rows(config) -> None:
    result = finetune(with_(config, shots=8, batch_size=4))
    assert read_journal(config.out / "journal").header.config["shots"] == 8
    asked = EvalConfig(model=str(config.out / "model"), task="sst2", data=config.data, split="dev", shots=8)
    scores = evaluate_model(asked)
    assert (scores.examples, scores.eval_loss, scores.metric) == (16, result.eval_loss, result.metric)


# -- mistakes -----------------------------------------------------------------------------------------------------


def test_a_task_for_causal_models_is_refused_before_the_first_step(config) -> None:
    with pytest.raises(ConfigError, match=r"squad \(generation\) has no cloze prompt for a masked language model"):
        finetune(with_(config, task="squad"))
    assert not (config.out / "journal").exists()


@torch.no_grad()
def test_a_masked_task_for_a_causal_model_has_its_causal_prompt(config, model_folder) -> None:
    scores = evaluate_model(EvalConfig(model=str(model_folder), task="sst2", data=config.data))
    assert scores.examples == 24


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_the_exact_head_has_a_bias(config, masked_folder, tmp_path, family) -> None:
    """Rows of the answers of head and bias, and the norm of the transform; from the journal, too."""
    changes = {"model": str(masked_folder(family)), "exact": "head", "body": "frozen", "dtype": "bf16", "steps": 20}
    result = finetune(with_(config, **changes))
    assert result.eval_loss < result.eval_loss_start and result.forwards == 20
    contents = read_journal(config.out / "journal")
    rows = len(contents.header.exact_rows)
    assert sorted(len(raw) // 4 for raw in contents.steps[0].exact.values()) == [rows, 32, 32, 32 * rows]
    assert replay(changes["model"], config.out, tmp_path / "replayed").verified
