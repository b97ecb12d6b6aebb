"""Stage two's loop: train with forward passes, journal every step, keep the best weights."""

import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from zoft import models, tasks
from zoft.deploy.card import model_card
from zoft.deploy.config import FinetuneConfig
from zoft.deploy.evaluate import peak_memory_bytes, score
from zoft.deploy.events import Evaluated, Event, Listener, Progress, Started, StepDone, Warned, silent
from zoft.deploy.folder import RunFolder
from zoft.deploy.header import check_header, make_header
from zoft.deploy.journal import Contents, EndLine, EvalLine, Journal, StepLine
from zoft.deploy.metrics import eval_metrics, metrics_so_far, step_metrics
from zoft.deploy.result import FinetuneResult, summarise
from zoft.deploy.snapshots import weights_sha256
from zoft.errors import ConfigError, Interrupted, RunError
from zoft.optim import Method, StepRecord, ZOOptimizer, get_method
from zoft.tasks import Encoded, Evaluation, Prepared
from zoft.tasks.objectives import Objective

CustomObjective = Callable[[Any, Sequence[Encoded]], float]

SKIPPED_IN_A_ROW = 10  # steps with a loss that is not finite, after which a run gives up
FLAT_STEPS_WARNED = 20


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    force: bool = False,
    objective: CustomObjective | None = None,
    on_event: Listener = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> FinetuneResult:
    """Fine-tune a model with forward passes only and return what came of it.

    Everything is kept in ``config.out``. With ``resume`` a run goes on where it stopped, to the same weights bit for
    bit; a finished one returns its result. ``force`` deletes the run that is there. ``objective(model, examples)``
    gives the number to minimise where ``config.objective`` is ``"custom"``: any number, no gradient is taken.
    ``cancelled`` is asked after every step and during evaluations.

    Raises:
        Interrupted: ``cancelled`` said so; the run is saved.
        ZoftError: the model, the data, the configuration or the folder cannot be used, or training diverged.
    """
    if (config.objective == "custom") != (objective is not None):
        raise ConfigError('a callable objective goes with objective="custom" in the configuration, and only with it')
    method = get_method(config.method)
    folder = RunFolder(config.out)
    with folder.locked():
        contents = folder.open(config, resume=resume, force=force)
        if contents.end is not None:
            return FinetuneResult.model_validate(contents.end.result)
        with _threads(contents.header.threads if contents.header else torch.get_num_threads()):
            run = _Run(config, method, folder, contents, objective or config.objective, on_event, cancelled)
            try:
                run.begin()
                run.train()
                return run.finish()
            finally:
                run.close()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads, on which the last bits of sums depend; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One fine-tuning run: the model, its optimizer, its data and its journal."""

    journal: Journal

    def __init__(
        self,
        config: FinetuneConfig,
        method: Method,
        folder: RunFolder,
        contents: Contents,
        objective: str | CustomObjective,
        on_event: Listener,
        cancelled: Callable[[], bool],
    ) -> None:
        self.config, self.method, self.folder, self.contents = config, method, folder, contents
        self.on_event, self.cancelled = on_event, cancelled
        self.lr = config.lr or method.lr
        self.eps = config.eps or method.eps
        self.started = time.perf_counter() - (contents.evaluations[-1].seconds if contents.evaluations else 0.0)
        on_event(Progress("loading", 0, 1))
        self.loaded = self._load()
        self.prepared = self._prepare()
        self.objective = tasks.objective(
            objective, self.prepared.task, self.loaded.tokenizer, batch_size=config.eval_batch_size
        )
        tasks.batch_indices(len(self.prepared.train), config.batch_size, config.seed, 0)  # fails early if too large
        self.optimizer = self._optimizer()
        self.skipped_in_a_row = 0
        self.flat = sum(record.flat for record in contents.steps)

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _load(self) -> models.Loaded:
        return models.load(self.config.model, dtype=self.config.dtype, device=self.config.device, fp32_vectors=True)

    def _prepare(self) -> Prepared:
        config = self.config
        prepared = tasks.prepare(
            config.task,
            config.data,
            self.loaded.tokenizer,
            context_length=models.context_length(self.loaded.model, self.loaded.tokenizer),
            train_size=config.train_size,
            dev_size=config.dev_size,
            test_size=config.test_size,
            seed=config.seed,
        )
        for warning in prepared.warnings:
            self.on_event(Warned(warning))
        if not prepared.dev:
            self.on_event(Warned("no dev split: the weights of the last step are kept"))
        return prepared

    def _optimizer(self) -> ZOOptimizer:
        return self.method.optimizer(
            self.loaded.model,
            lr=self.lr,
            eps=self.eps,
            probes=self.config.probes,
            weight_decay=self.config.weight_decay,
            seed=self.config.seed,
            master_weights=self.config.master_weights,
        )

    def begin(self) -> None:
        """Open the journal, bring the weights to where it ends, and check that the model can be perturbed."""
        header = make_header(self.config, self.loaded, self.prepared, self.lr, self.eps)
        if self.contents.header is not None:
            for warning in check_header(self.contents.header, header):
                self.on_event(Warned(warning))
        else:
            self.folder.write_config(self.config)
        self.journal = Journal(self.folder.journal, self.contents)
        if self.contents.header is None:
            self.journal.append(header)
            self.contents.header = header
        self._go_to(len(self.contents.steps), pristine=True)
        self.folder.rewrite_metrics(metrics_so_far(self.contents))
        self.on_event(self._started())
        plain_loss = tasks.objective("loss", self.prepared.task, self.loaded.tokenizer, batch_size=1)
        if doubt := self.optimizer.verify(lambda: self._evaluate(plain_loss, self._batch(0))):
            self.on_event(Warned(doubt))

    def _started(self) -> Started:
        blocks = self.optimizer.blocks
        return Started(
            step=len(self.contents.steps),
            steps=self.config.steps,
            model=self.config.model,
            task=self.prepared.task.name,
            method=self.config.method,
            blocks=len(blocks),
            parameters=sum(block.size for block in blocks),
            train=len(self.prepared.train),
            dev=len(self.prepared.dev),
            test=len(self.prepared.test),
        )

    # -- weights of any step ------------------------------------------------------------------------------------------

    def _go_to(self, step: int, *, pristine: bool = False) -> None:
        """Bring the weights to what they were after ``step`` steps: the last snapshot before, then the journal.

        ``pristine`` says that the weights are still the base's.
        """
        for candidate in reversed([saved for saved in self.folder.snapshots.steps() if saved <= step]):
            try:
                self.folder.snapshots.load(candidate, self.optimizer)
                break
            except RunError as error:
                pristine = False
                self.on_event(Warned(f"{error}; replaying from an earlier step"))
        else:
            candidate = 0
            if not pristine:
                self._forget_model()
                self.loaded = self._load()
                self.optimizer = self._optimizer()
        if candidate > 0:
            self.optimizer.observe(self.contents.steps[candidate - 1])
        for record in self.contents.steps[candidate:step]:
            self.optimizer.apply(record)
            self.on_event(Progress("replaying", record.step + 1 - candidate, step - candidate))

    def _forget_model(self) -> None:
        """Free the weights before others are loaded; model and optimizer are in reference cycles."""
        del self.loaded, self.optimizer
        gc.collect()

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Take the steps that are left."""
        for step in range(len(self.contents.steps), self.config.steps + 1):
            self._evaluate_if_due(step)
            if step == self.config.steps:
                break
            self._step(step)
            if (step + 1) % self.config.snapshot_interval == 0 and step + 1 < self.config.steps:
                self._snapshot(step + 1)
            if self.cancelled():
                self._snapshot(step + 1)
                raise self._interrupted()

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule_factor(self.config, step)
        batch = self._batch(step)
        record = self.optimizer.measure(lambda: self._evaluate(self.objective, batch))
        self.journal.append(StepLine.of(record))
        self.contents.steps.append(record)
        self.optimizer.apply(record)
        self.folder.add_metrics({**step_metrics(record), "seconds": self._seconds()})
        self.on_event(
            StepDone(
                step=step + 1,
                steps=self.config.steps,
                loss=record.loss,
                lr=record.lr[0],
                forwards=2 * self.config.probes * (step + 1),
                skipped=record.skipped,
            )
        )
        self._guard(record)

    def _batch(self, step: int) -> list[Encoded]:
        indices = tasks.batch_indices(len(self.prepared.train), self.config.batch_size, self.config.seed, step)
        return [self.prepared.train[index] for index in indices]

    def _evaluate(self, objective: Objective, batch: list[Encoded]) -> float:
        """The objective on ``batch``, in micro-batches whose sums are added in float64."""
        size = -(-len(batch) // self.config.accumulate)
        parts = [objective(self.loaded.model, batch[i : i + size]) for i in range(0, len(batch), size)]
        return float(sum(parts[1:], start=parts[0]).value)

    def _guard(self, record: StepRecord) -> None:
        """Warn of steps that move nothing; give up after ten losses in a row that are not finite."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.skipped else 0
        if self.skipped_in_a_row == 1:
            self.on_event(Warned(f"step {record.step}: the loss is not finite, the step is skipped"))
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise RunError(
                f"the loss was not finite in {SKIPPED_IN_A_ROW} steps in a row, up to step {record.step}; "
                f"try a lower --lr (it was {record.lr[0]:g}) or --dtype fp32"
            )
        self.flat += record.flat
        if record.flat and self.flat == FLAT_STEPS_WARNED:
            self.on_event(
                Warned(
                    f"{self.flat} of {len(self.contents.steps)} steps had a slope of exactly zero and moved nothing; "
                    "a larger --batch-size or --eps makes the objective change"
                )
            )

    # -- evaluation and snapshots -------------------------------------------------------------------------------------

    def _evaluate_if_due(self, step: int) -> None:
        due = step % self.config.evaluation_interval == 0 or step == self.config.steps
        done = any(line.step == step for line in self.contents.evaluations)
        if not due or done or not self.prepared.dev:
            return
        scores = score(
            self.loaded,
            self.prepared,
            self.prepared.dev,
            self.config.eval_batch_size,
            self._listen,
            "dev",
            generating=False,  # the best step is chosen by loss; generated text is scored at the end
        )
        best = min((line.loss for line in self.contents.evaluations), default=math.inf)
        kept = scores.loss < best
        if kept and step > 0:
            self.folder.snapshots.save(step, self.optimizer)
        line = EvalLine(step=step, loss=scores.loss, metric=scores.metric, kept=kept, seconds=self._seconds())
        self.journal.append(line)
        self.journal.flush()
        self.contents.evaluations.append(line)
        self.folder.snapshots.keep_only({step, self._kept_step(), max(self.folder.snapshots.steps(), default=0)})
        self.folder.add_metrics(eval_metrics(line))
        self.on_event(Evaluated(step, "dev", scores.loss, scores.metric, scores.metric_name, kept))

    def _kept_step(self) -> int:
        """The step whose weights are kept: best on dev, the last without a dev split."""
        kept = [line.step for line in self.contents.evaluations if line.kept]
        return kept[-1] if kept else len(self.contents.steps)

    def _snapshot(self, step: int) -> None:
        self.journal.flush()
        if step not in self.folder.snapshots.steps():
            self.folder.snapshots.save(step, self.optimizer)
        self.folder.snapshots.keep_only({step, self._kept_step()})

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> FinetuneResult:
        """Write the kept weights, score them as written, and close the journal."""
        kept = self._kept_step()
        if kept != len(self.contents.steps):
            self._go_to(kept)
        if kept == 0 and self.prepared.dev:
            self.on_event(Warned("no step was better on dev than the base model, whose weights are kept"))
        sha256 = weights_sha256(self.optimizer.blocks)
        assert self.contents.header is not None
        card = model_card(self.config.model, self.config, self.contents.header, kept)
        self.on_event(Progress("saving", 0, 1))
        shutil.rmtree(self.folder.model, ignore_errors=True)  # left by a run that was killed right here
        models.save(
            self.loaded.model, self.loaded.tokenizer, self.folder.model, dtype=self.loaded.stored_dtype, card=card
        )
        device = self.loaded.model.device
        self._forget_model()
        result = self._summary(kept, *self._final_scores(), device)
        self.journal.append(EndLine(kept=kept, sha256=sha256, result=result.public()))
        self.journal.flush()
        self.folder.snapshots.keep_only(set())
        return result

    def _final_scores(self) -> tuple[Evaluation | None, Evaluation | None]:
        """Dev and test scores of the checkpoint as ``zoft eval`` would load it."""
        written = models.load(self.folder.model, device=self.config.device)
        found: list[Evaluation | None] = []
        for split, encoded in (("dev", self.prepared.dev), ("test", self.prepared.test)):
            if not encoded:
                found.append(None)
                continue
            scores = score(written, self.prepared, encoded, self.config.eval_batch_size, self._listen, split)
            self.on_event(
                Evaluated(self._kept_step(), split, scores.loss, scores.metric, scores.metric_name, kept=True)
            )
            found.append(scores)
        return found[0], found[1]

    def _summary(
        self, kept: int, dev: Evaluation | None, test: Evaluation | None, device: torch.device
    ) -> FinetuneResult:
        steps = self.contents.steps
        tokens = sum(one.tokens for step in range(len(steps)) for one in self._batch(step))
        return summarise(
            self.config,
            self.contents,
            kept_step=kept,
            lr=self.lr,
            eps=self.eps,
            task=self.prepared.task,
            tokens=2 * self.config.probes * tokens,
            dev=dev,
            test=test,
            seconds=self._seconds(),
            peak_memory=peak_memory_bytes(device),
        )

    def close(self) -> None:
        """Close the journal, if it was opened."""
        if hasattr(self, "journal"):
            self.journal.close()

    def _listen(self, event: Event) -> None:
        """Pass an event of a long evaluation on, and stop there when asked to: everything is in the journal."""
        self.on_event(event)
        if self.cancelled():
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped after step {len(self.contents.steps)} of {self.config.steps}; go on with --resume")

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.started, 3)


def schedule_factor(config: FinetuneConfig, step: int) -> float:
    """Return what multiplies the learning rate at ``step`` (from 0): linear warm-up, then constant or linear to 0.

    >>> config = FinetuneConfig(model="m", task="sst2", steps=10, warmup=2, schedule="linear")
    >>> [schedule_factor(config, step) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "linear":
        return (config.steps - step) / max(1, config.steps - config.warmup)
    return 1.0
