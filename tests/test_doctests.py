"""Every example in a docstring runs and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import zoft

NEEDS = {"zoft.noise.kernels": "triton"}
MODULES = [module.name for module in pkgutil.walk_packages(zoft.__path__, "zoft.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert doctest.testmod(importlib.import_module(name)).failed == 0
