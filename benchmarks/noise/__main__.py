"""Cost of a number of noise, by source: nanoseconds to draw it, and to draw it and add it to weights.

    python -m benchmarks.noise [--dtype bf16] [--rounds 20] [--json] [--write]

The sources, each over 2**22 numbers in slices of 2**19: torch's own generator; a counter-based one (Philox) of numpy
alone and on as many threads as torch has, a generator for each slice; random signs, 64 from one random word; zoft's
table; and the table for the rows of an embedding that 8 x 40 tokens touch, counted over all 49,152 rows. ``bare`` adds
a tensor that is there already. The fastest rounds count. On a GPU numpy's sources are left out.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from benchmarks import page
from zoft.model.load import choose_device
from zoft.noise.direction import NoiseDirection
from zoft.weights.blocks import Block

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE, SLICES, WIDTH = 2**19, 8, 512
EMBEDDING, TOKENS = (49_152, WIDTH), 320


class Bench:
    """Weights, a buffer for what is perturbed, and the sources of noise: each fills slice ``k`` of ``z``."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.weights = torch.full(
            (SLICES, SLICE), 0.02, dtype=dtype, device=device
        )  # zeros may have no pages of their own
        self.out, self.z = torch.empty_like(self.weights[0]), torch.empty_like(self.weights)
        self.generator = torch.Generator(device).manual_seed(0)
        self.pool = ThreadPoolExecutor(torch.get_num_threads())
        self.shifts = torch.arange(64, device=device)
        block = Block("w", torch.nn.Parameter(self.weights.view(-1, WIDTH), requires_grad=False))
        self.direction, self.block = NoiseDirection(0, 0, table_dtype=dtype), block
        self.embedding = Block("e", torch.nn.Parameter(torch.full(EMBEDDING, 0.02, dtype=dtype, device=device)))
        self.rows = torch.arange(TOKENS, device=device) * 150

    def torch_generator(self) -> None:
        """One normal number after the other from torch's generator."""
        for k in range(SLICES):
            self.z[k].normal_(generator=self.generator)

    def philox(self) -> None:
        """A counter-based generator for each slice."""
        for k in range(SLICES):
            self._philox(k)

    def philox_threads(self) -> None:
        """The same on several threads."""
        list(self.pool.map(self._philox, range(SLICES)))

    def _philox(self, k: int) -> None:
        drawn = np.random.Generator(np.random.Philox(key=[0, k])).standard_normal(SLICE, dtype=np.float32)
        self.z[k].copy_(torch.from_numpy(drawn))

    def signs(self) -> None:
        """64 signs from every random word."""
        for k in range(SLICES):
            words = torch.empty(SLICE // 64, dtype=torch.int64, device=self.device)
            words.random_(-(2**63), None, generator=self.generator)
            bits = words[:, None] >> self.shifts & 1
            self.z[k].copy_((bits * 2 - 1).view(-1))

    def table(self) -> None:
        """Numbers of the table, copied; nothing is copied where they are added at once."""
        for lo, hi, z, _ in self.direction.windows(self.block, 0, self.block.size):
            self.z.view(-1)[lo:hi].view(z.shape).copy_(z)

    def add(self) -> None:
        """Add what was drawn."""
        for k in range(SLICES):
            torch.add(self.weights[k], self.z[k], alpha=1e-3, out=self.out)

    def table_added(self) -> None:
        """Read the table and add in one."""
        for start in range(0, self.block.size, SLICE):
            self.direction.perturb(self.block, start, start + SLICE, 1e-3, self.out)

    def touched_rows(self) -> None:
        """Perturb the rows of an embedding that a batch reads."""
        self.direction.perturb_rows(self.embedding, self.rows, 1e-3)


def main() -> None:
    """Time every source and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="also put the table into docs/performance.md")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    bench = Bench(DTYPES[arguments.dtype], device)
    numbers = SLICE * SLICES
    add = _nanoseconds(bench.add, arguments.rounds, device, numbers)
    rows: list[dict[str, object]] = [{"source": "bare", "draw ns": 0.0, "draw and add ns": add}]
    sources = [bench.torch_generator, bench.signs]
    sources += [bench.philox, bench.philox_threads] if device.type == "cpu" else []
    for source in sources:
        draw = _nanoseconds(source, arguments.rounds, device, numbers)
        rows.append({"source": source.__name__, "draw ns": draw, "draw and add ns": draw + add})
    both = _nanoseconds(bench.table_added, arguments.rounds, device, numbers)
    draw = _nanoseconds(bench.table, arguments.rounds, device, numbers)
    rows.append({"source": "table", "draw ns": draw, "draw and add ns": both})
    touched = _nanoseconds(bench.touched_rows, arguments.rounds, device, EMBEDDING[0] * EMBEDDING[1])
    rows.append({"source": "table, touched rows", "draw ns": 0.0, "draw and add ns": touched})
    text = page.table(list(rows[0]), [list(row.values()) for row in rows])
    if arguments.write:
        page.write(f"noise {arguments.dtype}", text)
    print(json.dumps(rows) if arguments.json else text)


def _nanoseconds(part: Callable[[], None], rounds: int, device: torch.device, numbers: int) -> float:
    fastest = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        part()
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest / numbers * 1e9


if __name__ == "__main__":
    main()
