"""The examples that the guide names are good descriptions."""

from pathlib import Path

import pytest

from zoft.cli.settings import resolve
from zoft.compare import CompareConfig

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the installed package comes without its examples")
@pytest.mark.parametrize("name", ["compare.yaml", "smollm2.yaml"])
def test_an_example_is_a_good_description(name: str):
    config = resolve(CompareConfig, {}, None, EXAMPLES / name)
    assert all(config.steps(spec) > 0 for spec in config.methods if not spec.is_baseline)
