"""``zoft compare``: files and flags, what it prints, Ctrl-C, wrong usage."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import ZOFT

RUNS = {"train_size": 16, "dev_size": 4, "test_size": 4, "eval_every": 1}
FLAGS = ["--set", "train_size=16", "--set", "dev_size=4", "--set", "test_size=4", "--batch-size", "4"]


@pytest.fixture
def file(model_folder: Path, rows: Path, tmp_path: Path) -> Path:
    described: dict[str, Any] = {"models": [str(model_folder)], "data": str(rows), "methods": ["mezo"], "budget": 4}
    described |= {"lr": ["1e-3"], "extensions": 0, "batch_size": 4, "settings": RUNS}  # YAML reads 1e-3 as text
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


def test_flags_alone_describe_a_comparison(zoft, model_folder, rows, tmp_path):
    result = zoft(
        "compare", model_folder, "--data", rows, "--method", "mezo", "--method", "zero-shot", "--budget", 5,
        "--lr", 1e-3, "--extensions", 0, "--seeds", 3, "--out", tmp_path / "c", "--json", *FLAGS,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(row["method"], row["forwards"]) for row in found["rows"]] == [("mezo", 4), ("zero-shot", 0)]
    assert found["seeds"] == [3] and found["done"] == found["total"] == 2
    assert "1/2 model.rows.mezo.lr0.001.seed3: dev loss" in result.stderr
    assert Path(found["page"]).is_file()


def test_flags_go_before_the_file(zoft, file, tmp_path):
    result = zoft("compare", file, "--budget", 2, "--set", "dev_size=3", "--out", tmp_path / "c", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"][0]["forwards"] == 2
    settings = json.loads((tmp_path / "c" / "settings.json").read_text())["settings"]
    assert settings == RUNS | {"dev_size": "3"}


def test_a_report_says_what_is_missing(zoft, file, tmp_path):
    result = zoft("compare", file, "--out", tmp_path / "c", "--report")
    assert result.exit_code == 0 and "1 of 1" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (
            ["--task", "sst2", "--method", "mezzo", "--budget", 10],
            1,
            "--method: no method 'mezzo'; did you mean",
        ),
        (["--task", "sst2", "--method", "mezo", "--budget", 1], 1, "less than one step of mezo takes; expected 2"),
        (["--task", "sst2", "--method", "mezo"], 1, "budget: missing"),
        (
            ["--task", "sst2", "--method", "mezo", "--budget", 10, "--set", "lr=1"],
            1,
            "settings.lr: the comparison",
        ),
        (["--task", "sst2", "--method", "mezo", "--budget", 10, "--tuner", "c"], 2, "--tuner goes with --method zoft"),
        (["--task", "sst2", "--method", "mezo", "--budget", 10, "--data", "nowhere"], 1, "no such folder: nowhere"),
    ],
)
def test_wrong_input_is_one_message(zoft, model_folder, arguments, code, message):
    result = zoft("compare", *([model_folder] if arguments else []), *arguments)
    assert result.exit_code == code and message in result.stderr and "Traceback" not in result.stderr


def test_a_file_that_is_no_yaml_is_named(zoft, tmp_path):
    (tmp_path / "c.yaml").write_text("models: [")
    result = zoft("compare", tmp_path / "c.yaml")
    assert result.exit_code == 1 and "c.yaml is not valid YAML" in result.stderr


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_saves_and_the_same_command_goes_on(file, tmp_path, jobs):
    """With two processes too: the first tells the second, which a terminal's Ctrl-C may not reach."""
    arguments = ["--budget", 400, "--seeds", 0, "--seeds", 1, "--set", "eval_every=100", "--jobs", jobs]
    command = [*ZOFT, "compare", str(file), "--out", str(tmp_path / "c")]
    command += list(map(str, arguments))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    journals = tmp_path / "c" / "runs"
    deadline = time.monotonic() + 120
    while len([one for one in journals.glob("*/journal") if one.stat().st_size > 3000]) < jobs:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "runs done; the same command goes on" in told
    assert len(list((tmp_path / "c" / "cells").glob("*"))) < 2 and list(journals.glob("*/snapshots/*"))
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["done"] == 2
