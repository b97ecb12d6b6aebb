"""Memory of tokenizers: a process that loads many, one after another, does not grow with them."""

import subprocess
import sys
from pathlib import Path

import pytest

from zoft.model.pretrained import read_tokenizer

GROWTH = """
import gc, random, sys
from pathlib import Path
from zoft.model.pretrained import read_tokenizer

def resident():
    gc.collect()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1])

draw = random.Random(0)
def load_and_encode():
    tokenizer = read_tokenizer(Path(sys.argv[1]))
    for _ in range(60):
        tokenizer(" ".join("".join(draw.choices("abcdefghijklmnop", k=8)) for _ in range(60)))

for _ in range(10):
    load_and_encode()
before = resident()
for _ in range(30):
    load_and_encode()
print((resident() - before) / 30)
"""


def test_a_tokenizer_that_is_gone_leaves_nothing(model_folder: Path) -> None:
    if not Path("/proc/self/status").is_file() or "RssAnon" not in Path("/proc/self/status").read_text():
        pytest.skip("no RssAnon in /proc/self/status")
    command = [sys.executable, "-c", GROWTH, str(model_folder)]
    kilobytes = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert kilobytes < 100


def test_ids_are_those_of_a_tokenizer_with_its_cache(model_folder: Path, tokenizer) -> None:
    text = "the film was great and the cast was lovely, zyzzyva " * 3
    assert read_tokenizer(model_folder)(text).input_ids == tokenizer(text).input_ids
