"""The README's way of a tuner, by people who have never met: a provider publishes, a user names a checkpoint only.

Every command is a process of its own, and the user's machine has an empty cache.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..hub import StandIn

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def machine(zoft_process, hub_environment: dict[str, str], tmp_path: Path) -> Callable[[str], Callable[..., Any]]:
    """``machine("mine")("tasks")``: run a command with the home folders of a machine, and read its JSON."""

    def start(name: str, **more: str) -> Callable[..., Any]:
        homes = {"HF_HOME": str(tmp_path / name / "hf"), "ZOFT_HOME": str(tmp_path / name / "zoft")}

        def zoft(*arguments: object) -> Any:
            done = zoft_process(*arguments, "--json", **{"HF_HUB_OFFLINE": "0"} | hub_environment | homes | more)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        return zoft

    return start


@pytest.fixture
def on_hub(hub: StandIn, model_folder: Path, tmp_path: Path) -> StandIn:
    """The Hub has a base, and a checkpoint that somebody derived from it and said so."""
    hub.lfs_patterns = ["*.safetensors"]
    files = {file.name: file.read_bytes() for file in model_folder.iterdir()}
    hub.put("org/base", files)
    derived = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in derived.parameters():
            parameter += (
                0.05 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    derived.save_pretrained(tmp_path / "derived")
    weights = (tmp_path / "derived" / "model.safetensors").read_bytes()
    hub.put("you/derived", files | {"model.safetensors": weights, "README.md": b"---\nbase_model: org/base\n---\n"})
    return hub


def test_publish_then_find_on_a_machine_with_an_empty_cache(
    on_hub: StandIn, machine, rows: Path, tmp_path: Path
) -> None:
    data = ["--data", rows]
    made = machine("provider")(
        "metatrain", "org/base", *data, "--steps", 4, "--evidence", 0, "--out", tmp_path / "b.tuner.safetensors",
        "--push", "org/base-tuner",
    )  # fmt: skip
    name = made["pushed"]
    assert name.startswith("org/base-tuner@")

    user, run = machine("user"), tmp_path / "run"
    steps = [*data, "--steps", 2, "--batch-size", 4]
    done = user("finetune", "you/derived", *steps, "--tuner", "auto", "--out", run)
    assert done["tuner"]["digest"] == made["tuner"]
    assert "declared derivative of org/base" in done["tuner"]["match"]
    assert json.loads((run / "config.json").read_text())["tuner"] == name
    (match,) = user("registry", "match", "org/base")["matches"]
    assert (match["kind"], match["source"]) == ("same base", name), "by published files: its weights are not here"
    assert not list((tmp_path / "user").rglob("models--org--base/**/*.safetensors"))

    on_hub.stop()
    offline = machine("user", HF_HUB_OFFLINE="1")
    assert offline("finetune", "you/derived", *steps, "--out", run, "--resume")["eval_loss"] == done["eval_loss"]
    again = offline("finetune", "you/derived", *steps, "--tuner", "org/base-tuner", "--out", tmp_path / "again")
    assert again["tuner"]["digest"] == made["tuner"] and again["eval_loss"] == done["eval_loss"]


def test_these_are_the_commands_of_the_readme() -> None:
    if not README.is_file():
        pytest.skip("the README is not beside the tests")
    page = README.read_text(encoding="utf-8")
    assert re.search(r"^zoft metatrain BASE .*--push org/base-tuner", page, re.MULTILINE)
    assert re.search(r"^zoft finetune \./checkpoint .*--tuner auto", page, re.MULTILINE)
