"""Jobs keep few compiled kernels; loading a model alone does not change the environment."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoft
from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model
from zoft.deploy.setup import load_model
from zoft.metatrain import MetatrainConfig
from zoft.metatrain.sampling import load_base
from zoft.model.kernel_caches import VARIABLES, bound_kernel_caches

_KERNELS = """
import torch
from zoft import memory
from zoft.model.kernel_caches import bound_kernel_caches

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

if {bounded}:
    bound_kernel_caches(torch.nn.Linear(576, 576))
weights, x = torch.ones(576, 576, dtype=torch.bfloat16), torch.ones(1600, 576, dtype=torch.bfloat16)
x[:4] @ weights
before = anonymous()
for length in range(8, 1600, 8):
    x[:length] @ weights
memory.release()
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no kernels are compiled for bfloat16 here"
)
def test_compiled_kernels_of_former_lengths_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:  # a run before this test has set them
        monkeypatch.delenv(name, raising=False)
    unbounded, bounded = (_megabytes(_KERNELS.format(bounded=flag)) for flag in (False, True))
    assert bounded < unbounded / 4 + 2


def test_the_environment_says_how_many_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [torch.nn.Linear(width, 1) for width in range(1, 7)] + [torch.nn.Linear(1, 1)]
    monkeypatch.setattr(os, "environ", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"})
    bound_kernel_caches(torch.nn.Sequential(*layers))
    assert os.environ == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7", "LRU_CACHE_CAPACITY": "12"}


def _megabytes(script: str) -> float:
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def test_loading_a_model_leaves_the_environment_alone(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    zoft.load(model_folder, device="cpu")
    assert dict(os.environ) == before


def _train(model: str) -> None:
    load_model(FinetuneConfig(model=model, task="sst2", method="mezo"))


def _metatrain(model: str) -> None:
    load_base(MetatrainConfig(model=model, tasks=("sst2",)), lambda warning: None)


def _evaluate(model: str) -> None:
    evaluate_model(EvalConfig(model=model, task="sst2"))


@pytest.mark.parametrize(
    ("job", "module"), [(_train, "deploy.setup"), (_evaluate, "deploy.evaluate"), (_metatrain, "metatrain.sampling")]
)
def test_jobs_bound_the_caches(job: Callable[[str], None], module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def load(model: str, **options: Any) -> None:
        assert options["bound_kernels"]
        raise Asked

    monkeypatch.setattr(f"zoft.{module}.load", load)
    with pytest.raises(Asked):
        job("a-model")
