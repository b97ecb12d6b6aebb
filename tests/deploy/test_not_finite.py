"""A model that computes NaN is an error, whatever is evaluated or trained."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zoft.cli.app import app
from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune
from zoft.errors import DivergedError

CHOICES = [{"prompt": f"toy {i} It was", "choices": [" great", " terrible"], "label": i % 2} for i in range(4)]
KINDS = {
    "classification": CHOICES,
    "completion": [{"prompt": "It was", "completion": " great"}] * 4,
    "text": [{"text": "It was great"}] * 4,
}


@pytest.fixture(params=[float("nan"), float("inf")], ids=["nan", "inf"])
def broken(request, model_folder: Path) -> Path:
    weights = load_file(model_folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"].view(-1)[:1] = request.param
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    return model_folder


def write(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_that_is_not_finite_is_an_error(kind, broken, tmp_path):
    data = write(tmp_path / "rows", KINDS[kind])
    with pytest.raises(DivergedError, match="the loss on test is nan"):
        evaluate_model(EvalConfig(model=str(broken), data=data))
    found = CliRunner().invoke(app, ["eval", str(broken), "--data", str(data), "--json"])
    assert (found.exit_code, found.stdout) == (1, "") and "the loss on test is nan" in found.stderr


@pytest.mark.parametrize(
    ("kind", "objective"), [("classification", "loss"), ("classification", "accuracy"), ("completion", "f1")]
)
def test_a_run_that_is_not_finite_is_an_error(kind, objective, broken, tmp_path):
    data = write(tmp_path / "rows", KINDS[kind])
    settings = {"method": "mezo", "steps": 2, "batch_size": 2, "objective": objective}
    with pytest.raises(DivergedError, match="not finite"):
        finetune(FinetuneConfig(model=str(broken), data=data, out=tmp_path / "run", **settings))
