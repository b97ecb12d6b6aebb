"""Freed memory returns to the system; reading weights into others takes no second copy."""

import gc
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from zoft import memory
from zoft.errors import ModelError
from zoft.model import checkpoint


def test_release_frees_what_cycles_hold() -> None:
    class Node:
        pass

    gc.disable()
    try:
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        gone = weakref.ref(node)
        del node
        memory.release()
        assert gone() is None
    finally:
        gc.enable()


_FREED_HEAP = """
import os, torch
from zoft import memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

blocks = [torch.ones(2**14) for _ in range(2000)]  # 128 MB below the size that malloc maps by itself
last = blocks[-1]
del blocks
kept = resident()
memory.release()
print(kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed heap back when asked")
def test_release_gives_freed_heap_back() -> None:
    assert float(_printed(_FREED_HEAP)) > 100


_READ = """
import resource, sys
from pathlib import Path
import torch
from zoft.model import checkpoint

path = Path(sys.argv[1])
size = 2**24
checkpoint.write_file(path, {"w": torch.full((size,), 0.5)})
target = torch.zeros(size)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def read():
    (stored,) = checkpoint.file_tensors(path)
    checkpoint.read_into(stored, target)
before = peak()
read()
assert (target == 0.5).all()
print((peak() - before) * 1024 / (4 * size))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_reading_into_weights_takes_no_second_copy(tmp_path: Path) -> None:
    assert float(_printed(_READ, tmp_path / "w.safetensors")) < 0.3  # comparing takes a quarter, one byte a weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_was_written(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK", 100)
    tensors = {
        "matrix": torch.randn(30, 17, generator=torch.Generator().manual_seed(0)).to(dtype),
        "scalar": torch.tensor(3.0).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "counts": torch.arange(250),
    }
    checkpoint.write_file(tmp_path / "w.safetensors", tensors)
    stored = {tensor.name: tensor for tensor in checkpoint.file_tensors(tmp_path / "w.safetensors")}
    assert set(stored) == set(tensors)
    for name, tensor in tensors.items():
        target = torch.zeros_like(tensor)
        checkpoint.read_into(stored[name], target)
        assert torch.equal(target, tensor)


def test_another_dtype_or_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    checkpoint.write_file(path, {"w": torch.ones(1000)})
    (stored,) = checkpoint.file_tensors(path)
    with pytest.raises(ModelError, match=r"w is F32 \[1000\], expected torch.bfloat16 \[1000\]"):
        checkpoint.read_into(stored, torch.zeros(1000, dtype=torch.bfloat16))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="ends within w"):
        checkpoint.read_into(stored, torch.zeros(1000))


def _printed(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
