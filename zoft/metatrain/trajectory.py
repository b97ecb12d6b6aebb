"""Trajectories: at each point of the teacher's path, take a meta-gradient and let the tuner learn from it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from zoft.errors import RunError
from zoft.events import MetaListener, MetaStepDone, Warned
from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.gradient import Closure
from zoft.metatrain.job import JobFolder
from zoft.metatrain.learner import Learner
from zoft.metatrain.rounding import rounding
from zoft.metatrain.sampling import Batches
from zoft.metatrain.step import MetaPoint, MetaStepper
from zoft.metatrain.teacher import Adam8bitTeacher, AdamTeacher, SGDTeacher, Teacher
from zoft.model.load import Loaded, restore_
from zoft.tasks import tokens_read
from zoft.tuner.normalisation import effective_sizes
from zoft.weights.blocks import Block

SKIPPED_IN_A_ROW = 10  # points that are not finite, after which a meta-training gives up
_TEACHERS: dict[str, Callable[..., Teacher]] = {"adam": AdamTeacher, "adam8bit": Adam8bitTeacher, "sgd": SGDTeacher}


class Trajectories:
    """The teacher's path from the base, again and again; ``learner`` learns at every point of it.

    ``step``, ``forwards`` and ``skipped`` count points, forward passes, and points that were not finite.
    """

    def __init__(
        self,
        config: MetatrainConfig,
        loaded: Loaded,
        blocks: Sequence[Block],
        batches: Batches,
        learner: Learner,
        folder: JobFolder,
        on_event: MetaListener,
    ) -> None:
        self._config, self._loaded, self._blocks, self._batches = config, loaded, blocks, batches
        self.learner, self._folder, self._on_event = learner, folder, on_event
        self.step = self.forwards = self.skipped = self._skipped_in_a_row = 0
        self._stepper = MetaStepper(
            blocks,
            learner.tuner,
            _TEACHERS[config.teacher](blocks, lr=config.teacher_lr),
            lr=config.lr,
            eps=config.eps,
            probes=config.probes,
            estimator=config.estimator,
            detach_normaliser=config.detach_normaliser,
            relative=config.relative,
            seed=config.seed,
        )

    def reset(self) -> None:
        """Return weights, moments and recurrent state to the start of a trajectory."""
        self._stepper.reset()  # frees the moments before the base is read
        restore_(self._loaded)

    def take_point(self) -> None:
        """Take the next point; one that is not finite teaches nothing and ends the trajectory.

        Raises:
            RunError: ten points in a row were not finite.
        """
        config, step = self._config, self.step
        data, batch = self._batches.at(step)
        sizes = effective_sizes(self.learner.tuner, self._loaded.model, self._blocks, tokens_read(batch))
        closure = self._batches.closure(step)
        self._stepper.lr, self._stepper.step_number = self.learner.lr, step
        self.learner.zero_grad()
        with rounding(self._blocks, config.dtype, config.seed):
            # The batch that the teacher takes next of the same task, if the meta-loss is taken there.
            fresh = self._batches.closure(step, ahead=1) if config.meta_batch == "fresh" else None
            plain = self._plain_losses(closure, fresh)
            point = self._stepper.step(closure, data.name, sizes, fresh)
        if point.finite:
            unit = point.unit if config.relative and point.unit else 1.0
            self.learner.learn(point.lr_gradient / unit, left=1 - step / config.steps)
        self.step += 1
        self.forwards += config.forwards_per_step
        self._folder.add_row(self._folder.metrics, self._metrics(data.name, point, plain))
        self._on_event(
            MetaStepDone(
                step=self.step,
                steps=config.steps,
                task=data.name,
                loss=point.loss,
                gain=point.gain,
                lr=self._stepper.lr,
                lowest=float(point.scales.min()),
                highest=float(point.scales.max()),
                forwards=self.forwards,
                skipped=not point.finite,
            )
        )
        self._guard(point)

    def _plain_losses(self, closure: Closure, fresh: Closure | None) -> tuple[float, ...]:
        """At every ``compare_every``-th point, the losses after a step with sigma = 1 at the same noise."""
        every = self._config.compare_every
        if not every or self.step % every:
            return ()
        self.forwards += 3 * self._config.probes
        return self._stepper.plain_losses_after(closure, fresh)

    def _metrics(self, task: str, point: MetaPoint, plain: tuple[float, ...]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": self.step,
            "task": task,
            "loss": _number(point.loss),
            "meta_loss": _number(sum(point.losses_after) / len(point.losses_after)),
            "gain": _number(point.gain),
            "lr": self._stepper.lr,
            "forwards": self.forwards,
            "finite": point.finite,
            "scales": [float(f"{scale:.4g}") for scale in point.scales.tolist()],
        }
        if plain:
            row["gain_sigma_1"] = _number(point.loss - sum(plain) / len(plain))
        return row

    def _guard(self, point: MetaPoint) -> None:
        """Leave a trajectory that has diverged; give up after ten such points in a row."""
        self._skipped_in_a_row = 0 if point.finite else self._skipped_in_a_row + 1
        if point.finite:
            return
        self.skipped += 1
        self._on_event(
            Warned(f"point {self.step}: a loss or gradient is not finite; nothing is learned, back to the base")
        )
        self.reset()
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise RunError(
                f"{SKIPPED_IN_A_ROW} points in a row were not finite, up to point {self.step}; try a lower "
                f"--teacher-lr (it is {self._config.teacher_lr:g}) or a lower --lr (it is {self._stepper.lr:g})"
            )


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
