"""A comparison of two methods on a random model of two layers, small enough to be made many times."""

from pathlib import Path
from typing import Any

import pytest

from zoft.compare import CompareConfig


@pytest.fixture
def described(model_folder: Path, rows: Path, tmp_path: Path) -> dict[str, Any]:
    """What a YAML file would say."""
    return {
        "models": [{"model": str(model_folder), "name": "tiny"}],
        "data": str(rows),
        "methods": ["mezo", "adam"],
        "budget": 6,
        "lr": [1e-3],
        "extensions": 0,
        "batch_size": 4,
        "settings": {"eval_every": 1, "train_size": 16, "dev_size": 4, "test_size": 4},
        "out": str(tmp_path / "out"),
    }


@pytest.fixture
def config(described: dict[str, Any]) -> CompareConfig:
    return CompareConfig.model_validate(described)
