"""The job of stage one: load the base, take the points of the trajectories, test the tuner, write its card."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from zoft.errors import Interrupted, RunError, ZoftError
from zoft.events import MetaEvent, MetaListener, MetaStarted, MetaStepDone, Progress, Warned, silent
from zoft.memory import peak_memory_bytes
from zoft.metatrain.activations import checkpoint_activations
from zoft.metatrain.build_card import make_card
from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.evidence import LONGER, MIN_STEPS
from zoft.metatrain.job import JobFolder
from zoft.metatrain.learner import Learner
from zoft.metatrain.result import MetatrainResult
from zoft.metatrain.rounding import rounding
from zoft.metatrain.sampling import Batches, TaskData, held_out, load_base, prepare
from zoft.metatrain.start import measured_energy, untrained_tuner, warm_start_scales
from zoft.metatrain.trajectory import Trajectories
from zoft.metatrain.trials import Trials
from zoft.model import fingerprint
from zoft.model.sources import resolve
from zoft.registry import Base, Card, LocalStore
from zoft.weights.blocks import trainable_blocks


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
    the same card; ``force`` deletes an existing job and card. ``cancelled`` is called, and the file ``cancel`` in the
    folder looked for, after every point.

    Raises:
        Interrupted: it was cancelled; what was learned up to the last reset is saved.
        ZoftError: the model, the data, the configuration or the folder cannot be used, or training diverged.
    """
    folder = JobFolder.of(config.card_file)
    found = resolve(config.model)
    with folder.locked():
        stored = folder.open(config, fingerprint.base_hash(found.path), resume=resume, force=force)
        if stored is not None:
            with contextlib.suppress(ValidationError):  # a damaged status: the result is put together again
                return MetatrainResult.model_validate(stored)
        try:
            job = _Job(config, folder, on_event, lambda: cancelled() or folder.cancel.exists())
        except ZoftError:
            if not folder.all_snapshots():  # nothing was done that --resume could go on from
                folder.clear()
            raise
        try:
            job.train()
            return job.finish()
        except ZoftError as error:
            state = "stopped" if isinstance(error, Interrupted) else "failed"
            folder.write_status(state, step=job.points.step, steps=config.steps, reason=str(error))
            raise


class _Job:
    """One meta-training: the base and the data are loaded, and the tuner is as at the last reset."""

    def __init__(
        self, config: MetatrainConfig, folder: JobFolder, on_event: MetaListener, cancelled: Callable[[], bool]
    ) -> None:
        self.config, self.folder, self._on_event, self.cancelled = config, folder, on_event, cancelled
        self.started = time.perf_counter()
        self._emit(Progress("loading", 0, 1))
        self.loaded = load_base(config, self._emit)
        self.blocks = trainable_blocks(self.loaded.model)
        if config.checkpoint_activations:
            checkpoint_activations(self.loaded.model, lambda: rounding(self.blocks, config.dtype, config.seed))
        self.base = Base.of(self.loaded, self.blocks)
        self.batches = Batches(self._tasks(), config, self.loaded)
        self.trials = self._trials()
        self.learner = Learner(untrained_tuner(config, self.blocks), config)
        self.points = Trajectories(config, self.loaded, self.blocks, self.batches, self.learner, folder, self._emit)
        self._go_to_last_reset()
        self._emit(
            MetaStarted(
                step=self.points.step,
                steps=config.steps,
                model=config.model,
                tasks=self.batches.names,
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
                self._emit(Warned(f"{data.name}: {warning}"))
        return found

    def _trials(self) -> Trials | None:
        """The runs that test the tuner; None if there are none, with a warning if that was not asked for."""
        config = self.config
        if config.evidence == 0 or not config.steps:
            return None
        rounds = config.evidence_rounds
        if rounds is None:
            self._emit(
                Warned(
                    f"no evidence: {config.evidence_budget} forwards are too few for runs of {MIN_STEPS} steps and "
                    f"others {LONGER} times as long; with more --steps the tuner would be tested"
                )
            )
            return None
        rows = held_out(config, self.batches.tasks[0], self.loaded)
        return Trials(config, self.loaded, self.blocks, rows, rounds, self.folder, self._emit, self.cancelled)

    def _go_to_last_reset(self) -> None:
        """Restore the newest snapshot; without one, warm-start the tuner if that is asked for."""
        config, points = self.config, self.points
        counters = self._newest_sound_snapshot()
        if counters is not None:
            points.step, points.forwards, points.skipped = (counters[key] for key in ("step", "forwards", "skipped"))
            self.started -= counters["seconds"]
        elif config.warm_start != "none" and config.steps:
            self._emit(Progress("measuring gradients" if config.warm_start == "energy" else "measuring signal", 0, 1))
            scales, forwards = warm_start_scales(config, self.blocks, self.batches)
            self.learner.start_from(scales)
            points.forwards += forwards
        self.folder.cut_metrics(points.step)

    def _newest_sound_snapshot(self) -> dict[str, Any] | None:
        """Load the newest snapshot that is neither damaged nor of another job; return its counters, None without."""
        for snapshot in self.folder.all_snapshots():
            try:
                return self.learner.load(snapshot, self.folder.identity_of(snapshot))
            except RunError as error:
                self._emit(Warned(f"{error}; its points are taken again"))
        return None

    def train(self) -> None:
        """Take the remaining points; every ``reset_every`` points, and at the end, return to the base."""
        config, begun = self.config, self.points.step
        for step in range(begun, config.steps):
            if step % config.reset_every == 0 and step > begun:
                self._reset()
            self.points.take_point()
            if self.cancelled():
                raise self._interrupted()
        if self.points.step > begun:
            self._reset()

    def _reset(self) -> None:
        """Return to the base, and save what was learned so far; the weights are the base's and need no saving."""
        points = self.points
        points.reset()
        counters = {
            "step": points.step,
            "forwards": points.forwards,
            "skipped": points.skipped,
            "seconds": self._seconds(),
        }
        snapshot = self.folder.snapshot(points.step)
        self.learner.save(snapshot, counters, self.folder.identity_of(snapshot))
        self.folder.keep_only(points.step)
        self.folder.write_status("running", step=points.step, steps=self.config.steps, forwards=points.forwards)

    def finish(self) -> MetatrainResult:
        """Write the card, test it as it is read back from disk, and write it again with its evidence."""
        config = self.config
        card = make_card(self.base, self.learner.tuner, config, self.batches.names, self.points.forwards)
        card.save(config.card_file)
        if self.trials is not None:
            self._emit(Progress("measuring gradients", 0, 1))
            energy = measured_energy(config, self.blocks, self.batches)
            card = self.trials.test(Card.load(config.card_file), energy, self.learner.lr)
            card.save(config.card_file)
        if config.steps:  # an untrained tuner would only keep `--tuner auto` from finding a better one
            try:
                LocalStore().add(card)
            except ZoftError as error:
                self._emit(Warned(f"the card is complete, but not in the local store: {error}"))
        result = self._result(card)
        self.folder.write_status("finished", step=self.points.step, steps=config.steps, result=result.public())
        return result

    def _result(self, card: Card) -> MetatrainResult:
        metadata, points = card.metadata, self.points
        return MetatrainResult(
            model=self.config.model,
            tasks=self.batches.names,
            steps=points.step,
            skipped_steps=points.skipped,
            forwards=points.forwards,
            evidence_forwards=sum(row.forwards for row in metadata.evidence),
            meta_lr=self.learner.lr,
            strength=metadata.network.strength,
            lr=metadata.recommended.lr,
            eps=metadata.recommended.eps,
            seed=self.config.seed,
            verdict=metadata.verdict,
            tuner=card.digest,
            bytes=len(card.content),
            seconds=self._seconds(),
            peak_memory_bytes=peak_memory_bytes(self.loaded.model.device),
            out=self.config.card_file,
            job=self.folder.path,
        )

    def _seconds(self) -> float:
        return round(time.perf_counter() - self.started, 3)

    def _emit(self, event: MetaEvent) -> None:
        """Pass an event to the listener; those that are neither points nor progress are also kept in the folder."""
        if not isinstance(event, MetaStepDone | Progress):
            self.folder.add_row(self.folder.events, {"event": type(event).__name__, **vars(event)})
        self._on_event(event)

    def _interrupted(self) -> Interrupted:
        step, steps = self.points.step, self.config.steps
        kept = step - step % self.config.reset_every if step < steps else step
        return Interrupted(f"stopped at point {step} of {steps}; --resume goes on from the reset at point {kept}")
