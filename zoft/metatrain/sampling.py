"""The data of a meta-training: batches of several tasks for the trajectories, held-out rows for the evidence."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from zoft import tasks
from zoft.errors import DataError
from zoft.events import Warned
from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.gradient import Closure
from zoft.model.architecture import vocabulary
from zoft.model.load import Loaded, load
from zoft.tasks import Encoded, Prepared
from zoft.tasks.losses import Objective
from zoft.weights.products import gradient_warning
from zoft.weights.streamed import devices_of, streaming

MIN_HELD_OUT = 12  # rows; fewer are not informative


@dataclass(frozen=True)
class TaskData:
    """A task with its encoded rows and its differentiable training loss."""

    prepared: Prepared
    loss: Objective

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.prepared.task.name


@dataclass(frozen=True)
class HeldOut:
    """Rows that meta-training has not seen: to train on, to choose rates by, and to report.

    ``split`` describes them, for the verdict.
    """

    data: TaskData
    split: str
    train: Sequence[Encoded]
    choose: Sequence[Encoded]
    report: Sequence[Encoded]


def load_base(config: MetatrainConfig, warn: Callable[[Warned], None]) -> Loaded:
    """Return the base in float32, whatever its stored dtype: the teacher's steps are too small for bf16."""
    loaded = load(
        config.model,
        dtype="fp32",
        device=config.device,
        device_map=config.device_map,
        adapter=config.adapter,
        seed=config.seed,
        bound_kernels=True,
    )
    if config.dtype == "bf16" and (slow := gradient_warning(torch.bfloat16, loaded.model.device)):
        warn(Warned(slow))
    return loaded


def prepare(task: str | None, config: MetatrainConfig, loaded: Loaded) -> TaskData:
    """Return the rows of a built-in task, or of the user's own data; `DataError` without enough training rows."""
    prepared = tasks.prepare(
        task,
        config.data,
        loaded.tokenizer,
        context_length=loaded.context_length,
        masked=loaded.masked,
        splits=("train", "dev"),
        train_size=config.train_size,
        dev_size=config.dev_size,
        seed=config.seed,
        vocabulary=vocabulary(loaded.model),
    )
    tasks.batch_indices(len(prepared.train), config.batch_size, config.seed, 0)  # fails early if too large
    if config.meta_batch == "fresh" and len(prepared.train) < 2 * config.batch_size:
        raise DataError(
            f"{prepared.task.name}: {len(prepared.train)} training rows, expected two batches of {config.batch_size} "
            "for meta_batch fresh; lower --batch-size, or use meta_batch same"
        )
    return TaskData(prepared, tasks.objective("loss", prepared.task, loaded.tokenizer, batch_size=1))


def held_out(config: MetatrainConfig, trained_on: TaskData, loaded: Loaded) -> HeldOut:
    """Return the rows of the evidence: of ``config.evidence_task``, else the dev rows of ``trained_on``."""
    if config.evidence_task is None:
        dev = trained_on.prepared.dev
        found = HeldOut(trained_on, "dev rows", dev[::2], dev[1::4], dev[3::4])
    else:
        data = prepare(config.evidence_task, config, loaded)
        found = HeldOut(
            data, "train and dev rows", data.prepared.train, data.prepared.dev[::2], data.prepared.dev[1::2]
        )
    if len(found.choose) + len(found.report) < MIN_HELD_OUT or len(found.train) < config.batch_size:
        raise DataError(
            f"{found.data.name}: {len(found.data.prepared.dev)} dev rows are too few to test the tuner on; name "
            "another task with --evidence-task, raise --set dev_size, or skip the evidence (--evidence 0)"
        )
    return found


def task_of(step: int, count: int, seed: int) -> tuple[int, int]:
    """Return the task of point ``step`` and the number of its batch: every round has each task once, shuffled.

    >>> sorted(task_of(step, 3, seed=0)[0] for step in (3, 4, 5))
    [0, 1, 2]
    """
    round_number, place = divmod(step, count)
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, round_number, 1))))
    return int(state.permutation(count)[place]), round_number


def batch_of(rows: Sequence[Encoded], config: MetatrainConfig, seed: int, number: int) -> list[Encoded]:
    """Return the examples of batch ``number``."""
    return [rows[index] for index in tasks.batch_indices(len(rows), config.batch_size, seed, number)]


def closure_of(data: TaskData, batch: Sequence[Encoded], loaded: Loaded, config: MetatrainConfig) -> Closure:
    """Return the differentiable loss of ``batch``, computed in bf16 if ``config.dtype`` is bf16."""

    def closure() -> torch.Tensor:
        with computing(loaded, config):
            return data.loss(loaded.model, batch).value

    return closure


@dataclass(frozen=True)
class Batches:
    """The batches of a meta-training: its tasks take turns, each along its own sequence of batches."""

    tasks: Sequence[TaskData]
    config: MetatrainConfig
    loaded: Loaded

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(data.name for data in self.tasks)

    def at(self, step: int, ahead: int = 0) -> tuple[TaskData, list[Encoded]]:
        """Return the task of point ``step`` and its batch there, or the one ``ahead`` batches of that task later."""
        which, number = task_of(step, len(self.tasks), self.config.seed)
        data = self.tasks[which]
        return data, batch_of(data.prepared.train, self.config, self.config.seed, number + ahead)

    def closure(self, step: int, ahead: int = 0) -> Closure:
        """Return the differentiable loss of the batch `at` a point."""
        data, batch = self.at(step, ahead)
        return closure_of(data, batch, self.loaded, self.config)


@contextmanager
def computing(loaded: Loaded, config: MetatrainConfig) -> Iterator[None]:
    """Context in which losses are computed: autocast for bf16, and weights streamed to the device."""
    device = devices_of(loaded.model)[0].type
    with streaming(loaded.model), torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bf16"):
        yield
