"""Stage one's loop: trajectories with periodic reset, a meta-gradient at every point, the evidence, the card."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from zoft.errors import Interrupted, RunError, ZoftError
from zoft.events import MetaEvent, MetaListener, MetaStarted, MetaStepDone, Progress, Warned, silent
from zoft.memory import peak_memory_bytes
from zoft.metatrain.activations import checkpoint_activations
from zoft.metatrain.build_card import make_card
from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.controls import energy_scales, gradient_energy
from zoft.metatrain.evidence import LONGER, MIN_STEPS
from zoft.metatrain.job import JobFolder
from zoft.metatrain.learner import Learner
from zoft.metatrain.result import MetatrainResult
from zoft.metatrain.rounding import rounding
from zoft.metatrain.sampling import TaskData, batch_of, closure_of, held_out, load_base, prepare, task_of
from zoft.metatrain.signal import Losses, drawn_losses, measure_signal, signal_scales
from zoft.metatrain.step import Closure, MetaPoint, MetaStepper
from zoft.metatrain.teacher import Adam8bitTeacher, AdamTeacher, SGDTeacher, Teacher
from zoft.metatrain.trials import Trials
from zoft.model import fingerprint
from zoft.model.load import restore_
from zoft.model.sources import resolve
from zoft.registry import Base, Card, LocalStore
from zoft.tasks import Encoded, collate, pad_id, tokens_read
from zoft.tuner.networks import PertNN, group_of
from zoft.tuner.normalisation import effective_sizes, full_sizes
from zoft.weights.blocks import trainable_blocks
from zoft.weights.streamed import streaming

ENERGY_BATCHES = 16
SIGNAL_BATCHES = 16  # of each task
SKIPPED_IN_A_ROW = 10  # points that are not finite, after which a meta-training gives up


def metatrain(
    config: MetatrainConfig,
    *,
    resume: bool = False,
    force: bool = False,
    on_event: MetaListener = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> MetatrainResult:
    """Learn a tuner for a base model, test it against its controls, and write its card.

    Everything but the card is kept in the folder ``<card>.run``. With ``resume`` a job goes on from its last reset, to
    the same card; ``force`` deletes the job and the card that are there. ``cancelled``, and the file ``cancel`` in the
    folder, are asked after every point.

    Raises:
        Interrupted: it was cancelled; what was learned up to the last reset is saved.
        ZoftError: the model, the data, the configuration or the folder cannot be used, or training diverged.
    """
    folder = JobFolder.of(config.card_file)
    found = resolve(config.model)
    with folder.locked():
        stored = folder.open(config, fingerprint.base_hash(found.path), resume=resume, force=force)
        if stored is not None:
            return MetatrainResult.model_validate(stored)
        job = _Job(config, folder, on_event, lambda: cancelled() or folder.cancel.exists())
        try:
            job.begin()
        except ZoftError:
            if folder.last_snapshot() is None:  # nothing was done that --resume could go on from
                folder.clear()
            raise
        try:
            job.train()
            return job.finish()
        except ZoftError as error:
            state = "stopped" if isinstance(error, Interrupted) else "failed"
            folder.write_status(state, step=job.step, steps=config.steps, reason=str(error))
            raise


class _Job:
    """One meta-training: the base, its trajectories, the tuner that is learned."""

    def __init__(
        self, config: MetatrainConfig, folder: JobFolder, on_event: MetaListener, cancelled: Callable[[], bool]
    ) -> None:
        self.config, self.folder, self._on_event, self.cancelled = config, folder, on_event, cancelled
        self.started = time.perf_counter()
        self.step = self.forwards = self.skipped = self.skipped_in_a_row = 0

    # -- beginning ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Load the base and the data, and go to the last reset."""
        config = self.config
        self.tell(Progress("loading", 0, 1))
        self.loaded = load_base(config, self.tell)
        self.blocks = trainable_blocks(self.loaded.model)
        if config.checkpoint_activations:
            checkpoint_activations(
                self.loaded.model, lambda: rounding(self.blocks, self.config.dtype, self.config.seed)
            )
        self.base = Base.of(self.loaded, self.blocks)
        self.tasks = self._tasks()
        self.trials = self._trials()
        self.learner = Learner(self._tuner(), config)
        self.stepper = MetaStepper(
            self.blocks,
            self.learner.tuner,
            self._teacher(),
            lr=config.lr,
            eps=config.eps,
            probes=config.probes,
            estimator=config.estimator,
            detach_normaliser=config.detach_normaliser,
            relative=config.relative,
            seed=config.seed,
        )
        if snapshot := self.folder.last_snapshot():
            counters = self.learner.load(snapshot)
            self.step, self.forwards, self.skipped = (counters[key] for key in ("step", "forwards", "skipped"))
            self.started -= counters["seconds"]
        elif config.warm_start != "none" and config.steps:
            self._warm_start()
        self.folder.cut_metrics(self.step)
        self.tell(
            MetaStarted(
                step=self.step,
                steps=config.steps,
                model=config.model,
                tasks=tuple(data.name for data in self.tasks),
                blocks=len(self.blocks),
                parameters=sum(block.size for block in self.blocks),
                networks=sum(weight.numel() for weight in self.learner.tuner.parameters()),
            )
        )

    def _tasks(self) -> list[TaskData]:
        if not self.config.steps:
            return []
        names: tuple[str | None, ...] = self.config.tasks or (None,)
        found = [prepare(name, self.config, self.loaded) for name in names]
        for data in found:
            for warning in data.prepared.warnings:
                self.tell(Warned(f"{data.name}: {warning}"))
        return found

    def _trials(self) -> Trials | None:
        """The runs that test the tuner; None where there are none, which is said."""
        config = self.config
        if config.evidence == 0 or not config.steps:
            return None
        rounds = config.evidence_rounds
        if rounds is None:
            self.tell(
                Warned(
                    f"no evidence: {config.evidence_budget} forwards are too few for runs of {MIN_STEPS} steps and "
                    f"others {LONGER} times as long; with more --steps the card would tell how good the tuner is"
                )
            )
            return None
        rows = held_out(config, self.tasks[0], self.loaded)
        return Trials(config, self.loaded, self.blocks, rows, rounds, self.folder, self.tell, self.cancelled)

    def _tuner(self) -> PertNN:
        config = self.config
        return PertNN(
            [block.name for block in self.blocks],
            levels=config.granularity,
            inputs=config.inputs,
            activation=config.activation,
            hidden=config.hidden,
            recurrent=config.recurrent,
            effective_size=config.effective_size,
            seed=config.seed,
        )

    def _teacher(self) -> Teacher:
        kinds: dict[str, Callable[..., Teacher]] = {
            "adam": AdamTeacher,
            "adam8bit": Adam8bitTeacher,
            "sgd": SGDTeacher,
        }
        return kinds[self.config.teacher](self.blocks, lr=self.config.teacher_lr)

    def _warm_start(self) -> None:
        if self.config.warm_start == "energy":
            self.learner.start_from(energy_scales(self._energy(), full_sizes(self.blocks)))
            self.forwards += 3 * ENERGY_BATCHES
        else:
            self.learner.start_from(self._signal_scales())
            self.forwards += 5 * SIGNAL_BATCHES * len(self.tasks)

    def _signal_scales(self) -> torch.Tensor:
        """Signal over Fisher trace of every kind at the base, the geometric mean over the tasks."""
        self.tell(Progress("measuring signal", 0, 1))
        kinds = [group_of(block.name, "kind") for block in self.blocks]
        generator = torch.Generator().manual_seed(self.config.seed)
        scales = [
            signal_scales(measure_signal(self.blocks, self._drawn_losses(data, generator)), kinds)
            for data in self.tasks
        ]
        return torch.stack(scales).log().mean(0).exp()

    def _drawn_losses(self, data: TaskData, generator: torch.Generator) -> Iterator[Losses]:
        """Losses of as many batches of a task, in float32: products of gradients need it."""
        model, filler = self.loaded.model, pad_id(self.loaded.tokenizer)
        for number in range(SIGNAL_BATCHES):
            batch = batch_of(data.prepared.train, self.config, self.config.seed, number)
            with streaming(model):
                losses = drawn_losses(model, data.prepared.task, collate(batch, filler, model.device), generator)
            yield losses

    def _energy(self) -> torch.Tensor:
        """The gradient energy of the blocks at the present weights, over batches of all tasks."""
        self.tell(Progress("measuring gradients", 0, 1))
        closures = (self._closure(number)[1] for number in range(ENERGY_BATCHES))
        with rounding(self.blocks, self.config.dtype, self.config.seed):
            return gradient_energy(self.blocks, closures)

    # -- trajectories -------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Take the points that are left."""
        begun = self.step
        for step in range(begun, self.config.steps):
            if step % self.config.reset_every == 0 and step > begun:
                self._reset()
                self._snapshot()
            self._point(step)
            if self.cancelled():
                raise self._interrupted()
        if self.step > begun:
            self._reset()
            self._snapshot()

    def _reset(self) -> None:
        """Return weights, moments and recurrent state to the start of a trajectory."""
        self.stepper.reset()  # frees the moments before the base is read
        restore_(self.loaded)

    def _snapshot(self) -> None:
        """Keep what was learned so far; the model is the base now and needs no keeping."""
        counters = {
            "step": self.step,
            "forwards": self.forwards,
            "skipped": self.skipped,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        self.learner.save(self.folder.snapshot(self.step), counters)
        self.folder.keep_only(self.step)
        self.folder.write_status("running", step=self.step, steps=self.config.steps, forwards=self.forwards)

    def _point(self, step: int) -> None:
        data, closure, sizes = self._closure(step)
        self.stepper.lr, self.stepper.step_number = self.learner.lr, step
        self.learner.zero_grad()
        with rounding(self.blocks, self.config.dtype, self.config.seed):
            fresh = self._fresh(step)
            plain = self._plain_losses(step, closure, fresh)
            point = self.stepper.step(closure, data.name, sizes, fresh)
        if point.finite:
            unit = point.unit if self.config.relative and point.unit else 1.0
            self.learner.learn(point.lr_gradient / unit, left=1 - step / self.config.steps)
        self.step += 1
        self.forwards += self.config.forwards_per_step
        self.folder.add_row(self.folder.metrics, self._metrics(data.name, point, plain))
        self.tell(
            MetaStepDone(
                step=self.step,
                steps=self.config.steps,
                task=data.name,
                loss=point.loss,
                gain=point.gain,
                lr=self.stepper.lr,
                lowest=float(point.scales.min()),
                highest=float(point.scales.max()),
                forwards=self.forwards,
                skipped=not point.finite,
            )
        )
        self._guard(point)

    def _closure(self, step: int) -> tuple[TaskData, Closure, torch.Tensor | None]:
        """The task of a point, the loss of its batch, and the effective sizes of the blocks there."""
        data, batch = self._batch(step)
        sizes = effective_sizes(self.learner.tuner, self.loaded.model, self.blocks, tokens_read(batch))
        return data, closure_of(data, batch, self.loaded, self.config), sizes

    def _fresh(self, step: int) -> Closure | None:
        """The loss of the batch that the teacher takes next of the same task, where the meta-loss is taken there."""
        if self.config.meta_batch == "same":
            return None
        data, batch = self._batch(step, ahead=1)
        return closure_of(data, batch, self.loaded, self.config)

    def _batch(self, step: int, ahead: int = 0) -> tuple[TaskData, list[Encoded]]:
        """The task of a point, and its batch there or so many batches of that task later."""
        which, number = task_of(step, len(self.tasks), self.config.seed)
        data = self.tasks[which]
        return data, batch_of(data.prepared.train, self.config, self.config.seed, number + ahead)

    def _plain_losses(self, step: int, closure: Closure, fresh: Closure | None) -> tuple[float, ...]:
        """Now and then, the losses after a step with sigma = 1 at the same noise: what the tuner is worth there."""
        every = self.config.compare_every
        if not every or step % every:
            return ()
        self.forwards += 3 * self.config.probes
        return self.stepper.plain_losses_after(closure, fresh)

    def _metrics(self, task: str, point: MetaPoint, plain: tuple[float, ...]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": self.step,
            "task": task,
            "loss": _number(point.loss),
            "meta_loss": _number(sum(point.losses_after) / len(point.losses_after)),
            "gain": _number(point.gain),
            "lr": self.stepper.lr,
            "forwards": self.forwards,
            "finite": point.finite,
            "scales": [float(f"{scale:.4g}") for scale in point.scales.tolist()],
        }
        if plain:
            row["gain_sigma_1"] = _number(point.loss - sum(plain) / len(plain))
        return row

    def _guard(self, point: MetaPoint) -> None:
        """Leave a trajectory that has diverged; give up after ten such points in a row."""
        self.skipped_in_a_row = 0 if point.finite else self.skipped_in_a_row + 1
        if point.finite:
            return
        self.skipped += 1
        self.tell(Warned(f"point {self.step}: a loss or gradient is not finite; nothing is learned, back to the base"))
        self._reset()
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise RunError(
                f"{SKIPPED_IN_A_ROW} points in a row were not finite, up to point {self.step}; try a lower "
                f"--teacher-lr (it is {self.config.teacher_lr:g}) or a lower --lr (it is {self.stepper.lr:g})"
            )

    # -- the evidence and the card ------------------------------------------------------------------------------------

    def finish(self) -> MetatrainResult:
        """Write the card, test it as it is read back from disk, and write it again with what that showed."""
        config = self.config
        names = [data.name for data in self.tasks]
        card = make_card(self.base, self.learner.tuner, config, names, self.forwards)
        card.save(config.card_file)
        evidence_forwards = 0
        if self.trials is not None:
            card = self.trials.test(Card.load(config.card_file), self._energy(), self.learner.lr)
            evidence_forwards = sum(row.forwards for row in card.metadata.evidence)
            card.save(config.card_file)
        if config.steps:  # an untrained tuner would only keep `--tuner auto` from finding a better one
            LocalStore().add(card)
        result = self._result(card, names, evidence_forwards)
        self.folder.write_status("finished", step=self.step, steps=config.steps, result=result.public())
        return result

    def _result(self, card: Card, names: list[str], evidence_forwards: int) -> MetatrainResult:
        metadata = card.metadata
        return MetatrainResult(
            model=self.config.model,
            tasks=tuple(names),
            steps=self.step,
            skipped_steps=self.skipped,
            forwards=self.forwards,
            evidence_forwards=evidence_forwards,
            meta_lr=self.learner.lr,
            strength=metadata.network.strength,
            lr=metadata.recommended.lr,
            eps=metadata.recommended.eps,
            seed=self.config.seed,
            verdict=metadata.verdict,
            tuner=card.digest,
            bytes=len(card.content),
            seconds=round(time.perf_counter() - self.started, 3),
            peak_memory_bytes=peak_memory_bytes(self.loaded.model.device),
            out=self.config.card_file,
            job=self.folder.path,
        )

    def tell(self, event: MetaEvent) -> None:
        """Pass an event on; those that are neither points nor progress are kept in the folder."""
        if not isinstance(event, MetaStepDone | Progress):
            self.folder.add_row(self.folder.events, {"event": type(event).__name__, **vars(event)})
        self._on_event(event)

    def _interrupted(self) -> Interrupted:
        kept = self.step - self.step % self.config.reset_every if self.step < self.config.steps else self.step
        return Interrupted(
            f"stopped at point {self.step} of {self.config.steps}; --resume goes on from the reset at point {kept}"
        )


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
