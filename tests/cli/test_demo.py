import json

import pytest
from typer.main import get_command

from zoft.cli.app import app
from zoft.demo import job
from zoft.demo import rows as data


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """One sentence of each template and label in every split."""
    monkeypatch.setattr(data, "SIZES", {"train": 24, "dev": 24, "test": 24})


def test_the_demo_prints_both_runs_side_by_side(zoft, model_folder, tmp_path):
    done = zoft("demo", "--model", model_folder, "--points", 2, "--steps", 1, "--out", tmp_path / "demo", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [run["method"] for run in result["runs"]] == ["mezo", "zoft"]
    assert [run["forwards"] for run in result["runs"]] == [2, 2]
    lines = [line.split() for line in done.stderr.splitlines()]
    assert ["before", "mezo", "zoft"] in lines
    scores = [f"{score:.4f}" for score in (result["test_loss_start"], *(run["test_loss"] for run in result["runs"]))]
    assert ["test", "loss", *scores] in lines
    assert result["outcome"] in done.stderr
    assert any(line[:2] == ["scales", "from"] or line[:3] == ["every", "scale", "is"] for line in lines)


def test_the_help_tells_the_true_defaults():
    options = {option.name: option.help for option in get_command(app).commands["demo"].params}
    assert f"[default: {job.POINTS}]" in options["points"]
    assert f"[default: {job.STEPS}]" in options["steps"]
