"""Triton kernels: compiled for GPUs that are not here, interpreted in a separate process, run where a GPU is."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from zoft.noise import fused
from zoft.noise.direction import NoiseDirection
from zoft.optim import MeZO, StepRecord
from zoft.weights.blocks import trainable_blocks
from zoft.weights.vectors import install_fp32_vectors

IDS = torch.arange(3, 27).view(2, 12)


def test_the_kernels_under_triton_s_interpreter() -> None:
    """Triton asks for it when it is imported, so these tests have a process of their own."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", str(root / "tests" / "noise" / "interpreted"), "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\[100%\]", done.stdout), done.stdout


def ptx(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> str:
    """Compile ``kernel`` as it is launched, pointers and sizes multiples of 16, and return its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(fused.LAUNCH_OPTIONS))
    assert compiled.asm["cubin"]
    return str(compiled.asm["ptx"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_product_and_sum_are_contracted(dtype: str, capability: int) -> None:
    """Each is rounded by itself to nearest, and half precision is rounded to nearest, not cut off."""
    language = pytest.importorskip("triton.language")
    from zoft.noise import kernels

    place = {"places": "*i32", "first": "i32"}
    pair = {"theta": f"*{dtype}", "out": f"*{dtype}", "table": "*bf16"}
    known = {"float32": 0, "bfloat16": 16, "float16": 13}
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    rounding = {"DTYPE": getattr(language, name), "DROPPED": known[name], "ALIGNED": True, "TILE": 1024}
    pointers = {"pointers": "*i64", "rows": "*i32", "table": "*bf16", "dither": "*i32", "tiles": "i32", "probes": "i32"}
    assert {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13} == fused.DROPPED_BITS
    for code in (
        ptx(
            kernels.perturb,
            pair | place | {"start": "i32", "stop": "i32"},
            {"WIDTH": 576, "LENGTH": 524160, "SIDE": 1, "TILE": 1024},
            capability,
        ),
        ptx(
            kernels.perturb_rows,
            pair | place | {"ids": "*i64"},
            {"WIDTH": 576, "ROWS": 910, "SIDE": -1, "TILE": 1024},
            capability,
        ),
        ptx(kernels.update, pointers, rounding, capability),
    ):
        assert "fma" not in code
        assert "mul.rn.f32" in code and re.search(r"(add|sub)\.rn\.f32", code)
        assert not re.search(r"(mul|add|sub)\.f(32|tz)", code)
        assert dtype == "fp32" or re.search(rf"cvt\.rn\.{dtype.replace('fp', 'f')}(x2)?\.f32", code)


def test_a_cpu_takes_the_plain_path() -> None:
    assert not fused.supports(torch.zeros(3))
    assert fused.float_bits(-0.5) == torch.tensor(-0.5).view(torch.int32).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_gpu_perturbs_and_updates_as_the_plain_path_does(dtype: torch.dtype, tiny_model, monkeypatch) -> None:
    pytest.importorskip("triton")
    model = tiny_model("llama", dtype=dtype)
    install_fp32_vectors(model)
    model = model.cuda()
    found = []
    for path in ("kernels", "plain"):
        moved, direction = copy.deepcopy(model), NoiseDirection(0, 0, table_dtype=dtype)
        blocks = trainable_blocks(moved)
        perturbed = [
            direction.perturb(block, 0, block.size, -1e-2, torch.empty_like(block.parameter).view(-1))
            for block in blocks
        ]
        rows = direction.perturb_rows(blocks[0], IDS.cuda(), 1e-2)
        record = StepRecord(0, 0, lr=(1e-3,), eps=1e-3, losses=((1.5, 1.25), (1.0, 1.75)))
        MeZO(moved, lr=0.0, eps=1.0, probes=2, weight_decay=0.1).apply(record)
        found.append((perturbed, rows, [block.parameter for block in blocks]))
        assert fused.supports(blocks[0].parameter) is (path == "kernels")
        monkeypatch.setattr(fused, "supports", lambda weights: False)
    (fast, fast_rows, fast_weights), (slow, slow_rows, slow_weights) = found
    for a, b in zip([*fast, fast_rows], [*slow, slow_rows], strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(fast_weights, slow_weights, strict=True))
