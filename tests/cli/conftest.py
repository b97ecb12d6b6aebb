"""A tiny model folder, a data file, and two ways to run the command: in this process and in one of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from zoft.cli.app import app


@pytest.fixture
def zoft() -> Callable[..., Result]:
    """``zoft("tasks", "--json")``: run the command in this process."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="zoft")

    return run


@pytest.fixture
def zoft_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``zoft_process("tasks")``: run the command in a process of its own."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "zoft.cli.app", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment, timeout=120, check=False
        )

    return run


@pytest.fixture
def model_folder(tiny_model, tokenizer, tmp_path: Path) -> Path:
    """A random Llama of two layers in Hugging Face layout."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty labelled rows of one's own in a jsonl file."""
    adjectives = ("great", "lovely", "happy", "terrible", "worse", "maybe")
    lines = [
        {"prompt": f"the {thing} was {word}. It was", "choices": [" terrible", " great"], "label": int(i < 3)}
        for thing in ("film", "cast", "plot", "toy", "ending", "apple", "box", "answer", "question", "model")
        for i, word in enumerate(adjectives)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
