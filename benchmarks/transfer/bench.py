"""Run one cell after another on one loaded base, which is restored between them."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.transfer.learning import Learning
from benchmarks.transfer.plan import Cell, Method, Outcome
from zoft import tasks
from zoft.errors import RunError
from zoft.metatrain.rounding import rounding
from zoft.model.load import load, restore_
from zoft.optim import ZOFineTuner
from zoft.tasks import Encoded, Evaluation, Prepared
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import trainable_blocks

DIVERGED = 2  # times the start's loss: a run above it at a check is stopped


@dataclass(frozen=True)
class Runs:
    """Settings of all runs; ``checks`` is the number of evaluations of a run, besides its start."""

    model: str
    data: Path
    steps: int
    batch_size: int
    eps: float
    train_size: int
    dev_size: int
    dtype: str
    device: str
    checks: int

    @property
    def check_steps(self) -> list[int]:
        """The steps after which a run is evaluated.

        >>> Runs("m", Path("d"), 10, 8, 1e-3, 1000, 64, "fp32", "cpu", 4).check_steps
        [2, 5, 8, 10]
        """
        return sorted({round(self.steps * part / self.checks) for part in range(1, self.checks + 1)} - {0})


class Bench:
    """The base, its data, and the networks of the methods."""

    def __init__(self, runs: Runs, learning: Learning) -> None:
        self.runs, self._learning = runs, learning
        self.loaded = load(runs.model, dtype="fp32", device=runs.device)
        self._blocks = trainable_blocks(self.loaded.model)
        self._data: dict[str, Prepared] = {}
        self._starts: dict[str, float] = {}
        self._networks: dict[str, tuple[PertNN, str]] = {}

    def tokens(self, task: str) -> int:
        """Tokens of an average training forward."""
        train = self._prepared(task).train
        return round(self.runs.batch_size * sum(one.tokens for one in train) / len(train))

    def run(self, cell: Cell, method: Method) -> Outcome:
        """Run ``cell`` from the base."""
        began = time.perf_counter()
        data = self._prepared(cell.task)
        net, tuner = self._of(method)
        optimizer = ZOFineTuner(self.loaded.model, net, lr=cell.lr, eps=self.runs.eps, seed=cell.seed)
        try:
            curve, metric, tokens = self._followed(optimizer, data, cell)
        finally:
            restore_(self.loaded)
        seconds = round(time.perf_counter() - began, 2)
        return Outcome(cell, tuner, tuple(curve), metric, data.task.metric, seconds, tokens)

    def _followed(
        self, optimizer: ZOFineTuner, data: Prepared, cell: Cell
    ) -> tuple[list[tuple[int, float]], float | None, int]:
        """Take the steps; return the curve, the metric at the end and the tokens of the forwards."""
        start = self._start(cell.task)
        curve, metric, tokens = [(0, start)], None, 0
        for step in range(1, self.runs.steps + 1):
            batch = self._batch(data, cell.seed, step - 1)
            tokens += 2 * sum(one.tokens for one in batch)
            finite = self._stepped(optimizer, data, batch)
            if finite and step not in self.runs.check_steps:
                continue
            scores = self._score(cell.task) if finite else None
            if scores is None or not scores.loss <= DIVERGED * start:
                return [*curve, (2 * step, math.inf)], None, tokens
            curve.append((2 * step, scores.loss))
            metric = scores.metric
        return curve, metric, tokens

    def _batch(self, data: Prepared, seed: int, step: int) -> list[Encoded]:
        indices = tasks.batch_indices(len(data.train), self.runs.batch_size, seed, step)
        return [data.train[index] for index in indices]

    def _stepped(self, optimizer: ZOFineTuner, data: Prepared, batch: list[Encoded]) -> bool:
        """Take a step; False if the run has diverged."""
        objective = tasks.objective("loss", data.task, self.loaded.tokenizer, batch_size=1)

        def closure() -> torch.Tensor:
            return objective(self.loaded.model, batch).value

        try:
            with self._precision():
                return math.isfinite(optimizer.step(closure))
        except RunError:  # scales of weights that are not finite
            return False

    def _of(self, method: Method) -> tuple[PertNN, str]:
        if method.label not in self._networks:
            self._networks[method.label] = self._learning.networks(method, self.loaded)
        return self._networks[method.label]

    def _start(self, task: str) -> float:
        if task not in self._starts:
            self._starts[task] = self._score(task).loss
        return self._starts[task]

    def _score(self, task: str) -> Evaluation:
        data = self._prepared(task)
        with self._precision():
            return tasks.evaluate(
                self.loaded.model, self.loaded.tokenizer, data.task, data.dev, batch_size=16, generating=False
            )

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute in bf16 if the runs do, over weights that stay float32."""
        bf16 = self.runs.dtype == "bf16"
        autocast = torch.autocast(self.loaded.model.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
        with rounding(self._blocks, self.runs.dtype, seed=0), autocast:
            yield

    def _prepared(self, task: str) -> Prepared:
        if task not in self._data:
            self._data[task] = tasks.prepare(
                task,
                self.runs.data,
                self.loaded.tokenizer,
                context_length=self.loaded.context_length,
                splits=("train", "dev"),
                train_size=self.runs.train_size,
                dev_size=self.runs.dev_size,
            )
        return self._data[task]
