"""Stage two's loop: train with forward passes, journal every step, keep the best weights."""

import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from zoft import tasks
from zoft.deploy.choice import Choice, check_objective, choose, choose_again, open_named
from zoft.deploy.config import FinetuneConfig
from zoft.deploy.displacement import Start
from zoft.deploy.evaluate import evaluate_split, evaluate_written
from zoft.deploy.folder import RunFolder
from zoft.deploy.graphs import BatchEnds, BatchGraphs, SentDirection, check_settings
from zoft.deploy.guard import Guard
from zoft.deploy.header import check_header, make_header
from zoft.deploy.journal import Contents, EndLine, EvalLine, Journal, ProjectionLine, StepLine
from zoft.deploy.metrics import eval_metrics, metrics_so_far, projection_metrics, step_metrics
from zoft.deploy.model_card import model_card
from zoft.deploy.result import FinetuneResult, finished, summarise
from zoft.deploy.setup import (
    batch_of,
    exact_rows,
    load_model,
    make_optimizer,
    prepare_data,
    save_model,
    started,
    warn_of_padding,
    with_exact_lr,
)
from zoft.deploy.snapshots import weights_sha256
from zoft.deploy.weights import bring_to
from zoft.errors import ConfigError, Interrupted
from zoft.events import Evaluated, Event, Listener, Progress, StepDone, Warned, silent
from zoft.memory import Trimmer, peak_memory_bytes, release
from zoft.model.load import choose_device
from zoft.noise.rounding import dither_table
from zoft.noise.table import forget_tables
from zoft.optim import Closure, FullObjective, Record, RecordOptimizer, StepRecord, ZOOptimizer, get_method
from zoft.registry import Found
from zoft.tasks import Encoded, Weighted
from zoft.tasks.losses import BatchLoss, Objective, TrainingLoss, backward, losses_of, mean, micro_batches
from zoft.threads import threads
from zoft.weights.products import gradient_warning
from zoft.weights.streamed import streaming

CustomObjective = Callable[[Any, Sequence[Encoded]], float]


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    force: bool = False,
    salvage: bool = False,
    objective: CustomObjective | None = None,
    on_event: Listener = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> FinetuneResult:
    """Fine-tune a model with forward passes only and return the result.

    Everything is kept in ``config.out``. With ``resume`` a run goes on where it stopped, to the same weights bit for
    bit; a finished one returns its result. With ``salvage``, too, a journal that is damaged in the middle is cut there,
    a copy of it is kept, and the run goes on from the last step that its checksums prove. ``force`` deletes the run in
    the folder, and accepts a tuner card that was made for other weights of the same architecture.
    ``objective(model, examples)`` gives the number to minimise where ``config.objective`` is ``"custom"``: any number,
    no gradient is taken. ``cancelled`` is called after every step and during evaluations.

    Raises:
        Interrupted: ``cancelled`` returned True; the run is saved.
        ZoftError: the model, the data, the configuration or the folder cannot be used, or training diverged.
    """
    if (config.objective == "custom") != (objective is not None):
        raise ConfigError('a callable objective goes with objective="custom" in the configuration, and only with it')
    if config.wanted_method is not None:
        get_method(config.wanted_method)  # fails before anything is loaded, as the next line does
    named = None if resume else open_named(config)
    folder = RunFolder(config.out)
    with folder.locked():
        contents = folder.open(config, resume=resume, force=force, salvage=salvage)
        if contents.end is not None:
            if not config.keep_model:
                folder.remove_model()  # a kill may have come before
            return finished(contents.end, folder.journal)
        with threads(contents.header.threads if contents.header else torch.get_num_threads()):
            run = _Run(config, folder, contents, named, force, objective or config.objective, on_event, cancelled)
            try:
                with streaming(run.loaded.model):
                    run.begin()
                    run.train()
                    return run.finish()
            finally:
                run.close()


class _Run:
    """One fine-tuning run: the model, its optimizer, its data and its journal."""

    journal: Journal

    def __init__(
        self,
        config: FinetuneConfig,
        folder: RunFolder,
        contents: Contents,
        named: Found | None,
        force: bool,
        objective: str | CustomObjective,
        on_event: Listener,
        cancelled: Callable[[], bool],
    ) -> None:
        self.config, self.folder, self.contents = config, folder, contents
        self.on_event, self.cancelled = on_event, cancelled
        self.started = time.perf_counter() - (contents.evaluations[-1].seconds if contents.evaluations else 0.0)
        if config.graphs:
            check_settings(choose_device(config.device), config.device_map, config.objective)
        on_event(Progress("loading", 0, 1))
        self.loaded = load_model(self.config)
        self.choice = self._choose(named, force)
        self.config = self._dated(self.choice.resolved(config))
        self.prepared = prepare_data(self.config, self.loaded, on_event)
        self.config = self.config.model_copy(update={"date": self.prepared.date})
        check_objective(self.choice.method, self.config)
        self.rows = exact_rows(self.config, self.prepared)
        self.config = with_exact_lr(self.config, contents.header, self.rows)
        self.objective = tasks.objective(
            objective, self.prepared.task, self.loaded.tokenizer, batch_size=config.eval_batch_size
        )
        self.batch: list[Encoded] = []  # of the step that is measured
        self.optimizer = self._make_optimizer()
        self.start = Start(self.optimizer.blocks) if self.config.log_displacement else None
        self.guard = Guard(contents.steps, on_event)
        self.forwards = contents.forwards
        self.trimmer = Trimmer()

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _choose(self, named: Found | None, force: bool) -> Choice:
        if self.contents.header is not None:
            return choose_again(self.config, self.loaded, self.contents.header, self.folder)
        return choose(self.config, self.loaded, named, force=force, on_event=self.on_event)

    def _dated(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return ``config`` with the date that the run began with, if its rows hold one."""
        stored = self.contents.header.config.get("date") if self.contents.header else None
        return config if stored is None else config.model_copy(update={"date": datetime.date.fromisoformat(stored)})

    def _make_optimizer(self) -> RecordOptimizer:
        train = self.prepared.train
        whole = BatchLoss(lambda: self._parts(self.objective, train))
        full = FullObjective(whole, len(train) / self.config.batch_size)
        self.graphs: BatchGraphs | None = None  # made in the first step, of the weights that are there then
        optimizer = make_optimizer(self.config, self.choice, self.loaded.model, lambda: self.batch, full, self.rows)
        optimizer.journal = self._journal_record
        return optimizer

    def begin(self) -> None:
        """Open the journal, bring the weights to where it ends, and check that the model can be perturbed."""
        choice = self.choice
        header = make_header(
            self.config,
            self.loaded,
            self.prepared,
            lr=choice.lr,
            eps=choice.eps,
            tuner=choice.used,
            exact_rows=self.rows,
        )
        if self.contents.header is not None:
            for warning in check_header(self.contents.header, header):
                self.on_event(Warned(warning))
        else:
            self.folder.write_config(self.config)
            if choice.tuner is not None:
                self.folder.write_tuner(choice.tuner.card)
        self.journal = Journal(self.folder.journal, self.contents)
        if self.contents.header is None:
            self.journal.append(header)
            self.contents.header = header
        warn_of_padding(self.loaded, self.prepared, self.on_event)  # of the base, on resume too
        self._go_to(len(self.contents.steps), pristine=True)
        self.folder.rewrite_metrics(metrics_so_far(self.contents))
        release()  # heap that encoding and hashing freed would otherwise stay in use
        self.on_event(started(self.config, self.prepared, self.optimizer, step=len(self.contents.steps)))
        plain_loss = tasks.objective("loss", self.prepared.task, self.loaded.tokenizer, batch_size=1)
        batch = batch_of(self.prepared, self.config, 0)
        if doubt := self.optimizer.verify(BatchLoss(lambda: self._parts(plain_loss, batch))):
            self.on_event(Warned(doubt))
        model = self.loaded.model
        if choice.method.first_order and (slow := gradient_warning(model.dtype, model.device)):
            self.on_event(Warned(slow))
        if (last := len(self.contents.steps) - 1) not in self.contents.projections and last >= 0:
            self.batch = batch_of(self.prepared, self.config, last)
            self.optimizer.take_projection(self._projected)  # the run was stopped between the step and its projection

    # -- weights of any step ------------------------------------------------------------------------------------------

    def _go_to(self, step: int, *, pristine: bool = False) -> None:
        """Bring the weights to what they were after ``step`` steps; ``pristine``: they are still the base's."""

        def anew() -> RecordOptimizer:
            self.loaded = load_model(self.config, self._forget_model())
            self.optimizer = self._make_optimizer()
            return self.optimizer

        snapshots = self.folder.snapshots
        bring_to(
            step,
            self.optimizer,
            self.contents,
            snapshots,
            pristine=pristine,
            anew=anew,
            measure=self._measure_again,
            on_event=self.on_event,
        )

    def _forget_model(self) -> PreTrainedTokenizerBase:
        """Free the weights and all that steps read before other weights are loaded; return the tokenizer for these."""
        tokenizer = self.loaded.tokenizer
        del self.loaded, self.optimizer, self.graphs
        forget_tables()
        dither_table.cache_clear()
        release()
        return tokenizer

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
        self.optimizer.step(self._closure_of(step), projection=self._projected)
        record = self.contents.steps[step]
        self.on_event(
            StepDone(
                step=step + 1,
                steps=self.config.steps,
                loss=record.loss,
                lr=record.lr[0],
                forwards=self.forwards,
                skipped=record.skipped,
            )
        )
        self.guard.check(record)
        self.trimmer.trim_if_due()

    def _journal_record(self, record: Record) -> None:
        """Write a record before the optimizer applies it."""
        if isinstance(record, StepRecord):
            self.journal.append(StepLine.of(record))
            self.contents.steps.append(record)
            self.folder.add_metrics({**step_metrics(record), "seconds": self._seconds()})
        else:
            self.journal.append(ProjectionLine.of(record))
            self.contents.projections[record.step] = record
            self.folder.add_metrics(projection_metrics(record))
        self.contents.checksums[record.step + 1] = self.journal.checksum
        self.forwards += record.forwards

    def _measure_again(self, step: int) -> None:
        """Measure a step whose record holds no gradient, so that it can be applied again."""
        self.optimizer.measure(self._closure_of(step))

    def _closure_of(self, step: int) -> Closure:
        """Set learning rate and batch of ``step``, and return the objective on that batch."""
        for group in self.optimizer.param_groups:
            if self.config.exact_lr is not None:
                group["exact_lr"] = self.config.exact_lr * self.config.lr_factor(step)
            group["lr"] = self.choice.lr * self.config.lr_factor(step)
        self.batch = batch_of(self.prepared, self.config, step)
        if self.choice.method.first_order:
            parameters = [block.parameter for block in self.optimizer.blocks]
            return lambda: backward(self._parts(self.objective, self.batch), parameters)
        eager = BatchLoss(lambda: self._parts(self.objective, self.batch))
        if not self.config.graphs or not isinstance(self.objective, TrainingLoss):
            return eager
        return BatchEnds(eager, self._captured(), micro_batches(self.batch, self.config.accumulate))

    def _captured(self) -> BatchGraphs:
        """The graphs of both ends of a probe, for the weights that are there now."""
        if self.graphs is None:
            optimizer = self.optimizer
            assert isinstance(optimizer, ZOOptimizer)  # `check_settings`
            assert isinstance(self.objective, TrainingLoss)
            source = SentDirection(self.config.seed, optimizer.table_dtype, optimizer.blocks)
            self.graphs = BatchGraphs(self.loaded.model, self.objective, source)
        return self.graphs

    def _projected(self) -> torch.Tensor:
        """The objective on the batch of the step, in the graph of autograd, which some projections need."""
        return mean(self._parts(self.objective, self.batch))

    def _parts(self, objective: Objective, batch: Sequence[Encoded]) -> Iterator[Weighted]:
        """The objective on micro-batches; all training examples come in as many as their batches would."""
        count = self.config.accumulate * -(-len(batch) // self.config.batch_size)
        return losses_of(objective, self.loaded.model, batch, count)

    # -- evaluation and snapshots -------------------------------------------------------------------------------------

    def _evaluate_if_due(self, step: int) -> None:
        due = step % self.config.evaluation_interval == 0 or step == self.config.steps
        done = any(line.step == step for line in self.contents.evaluations)
        if not due or done or not self.prepared.dev:
            return
        scores = evaluate_split(
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
            self._save_snapshot(step)
        line = EvalLine(
            step=step,
            loss=scores.loss,
            metric=scores.metric,
            kept=kept,
            seconds=self._seconds(),
            displacement=self.start.lengths(self.optimizer.blocks) if self.start else None,
        )
        self.journal.append(line)
        self.journal.flush()
        self.contents.evaluations.append(line)
        self.folder.snapshots.keep_only({step, self.contents.kept_step, max(self.folder.snapshots.steps(), default=0)})
        self.folder.add_metrics(eval_metrics(line))
        self.on_event(Evaluated(step, "dev", scores.loss, scores.metric, scores.metric_name, kept))

    def _snapshot(self, step: int) -> None:
        self.journal.flush()
        if step not in self.folder.snapshots.steps():
            self._save_snapshot(step)
        self.folder.snapshots.keep_only({step, self.contents.kept_step})

    def _save_snapshot(self, step: int) -> None:
        self.folder.snapshots.save(step, self.optimizer, self.contents.checksums[step])

    # -- the end ------------------------------------------------------------------------------------------------------

    def finish(self) -> FinetuneResult:
        """Write the kept weights, score them as written, and close the journal."""
        kept = self.contents.kept_step
        if kept != len(self.contents.steps):
            self._go_to(kept)
        if kept == 0 and self.prepared.dev:
            self.on_event(Warned("no step was better on dev than the base model, whose weights are kept"))
        sha256 = weights_sha256(self.optimizer.blocks)
        assert self.contents.header is not None
        card = model_card(self.loaded, self.config, self.contents.header, kept)
        save_model(self.loaded, self.folder.model, card, self.on_event)
        device = self.loaded.model.device
        tokenizer = self._forget_model()
        scores = evaluate_written(self.folder.model, tokenizer, self.prepared, self.config, kept, self._listen)
        result = summarise(
            self.config,
            self.contents,
            self.choice,
            self.prepared,
            kept_step=kept,
            scores=scores,
            seconds=self._seconds(),
            peak_memory=peak_memory_bytes(device),
        )
        self.journal.append(EndLine(kept=kept, sha256=sha256, result=result.public()))
        self.journal.flush()
        self.folder.snapshots.keep_only(set())
        if not self.config.keep_model:
            self.folder.remove_model()
        return result

    def close(self) -> None:
        """Close the journal, if it was opened."""
        if hasattr(self, "journal"):
            self.journal.close()

    def _listen(self, event: Event) -> None:
        """Pass on an event of a long evaluation; stop there when cancelled, since everything is in the journal."""
        self.on_event(event)
        if self.cancelled():
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped after step {len(self.contents.steps)} of {self.config.steps}; go on with --resume")

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.started, 3)
