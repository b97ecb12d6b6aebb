"""Carry out or resume one run of a comparison, and return its outcome."""

import shutil
from collections.abc import Callable

from zoft.compare.cells import Cell, Outcome, Point
from zoft.compare.config import IN_CONTEXT, CompareConfig, MethodSpec, ModelSpec
from zoft.compare.folder import CompareFolder
from zoft.compare.meter import Meter
from zoft.deploy import EvalConfig, FinetuneConfig, FinetuneResult, Listener, evaluate_model, finetune
from zoft.deploy.journal import Contents, read_journal
from zoft.errors import DataError, DivergedError, Interrupted, RunError
from zoft.events import Event
from zoft.model.load import choose_device
from zoft.tasks import get_task

# Settings of runs that also apply to scoring the base.
_SCORING = ("date", "device", "device_map", "train_size", "dev_size", "test_size")


class Runner:
    """Carries out the runs of ``config`` in ``folder``."""

    def __init__(
        self, config: CompareConfig, folder: CompareFolder, on_event: Listener, cancelled: Callable[[], bool]
    ) -> None:
        self.config, self.folder = config, folder
        self._on_event, self._cancelled = on_event, cancelled
        self._models = {spec.name: spec for spec in config.models}
        self._methods = {spec.label: spec for spec in config.methods}
        self._device = choose_device(config.settings.get("device", "auto"))

    def run(self, cell: Cell) -> Outcome:
        """Carry out the run of ``cell`` and return its outcome.

        Raises:
            Interrupted: ``cancelled`` returned true; the run is saved.
            ZoftError: the run failed.
        """
        model, spec = self._models[cell.model], self._methods[cell.method]
        if spec.is_baseline:
            return self._scored(cell, model, spec)
        assert cell.lr is not None
        config = self.config.run(model, cell.task, spec, lr=cell.lr, seed=cell.seed)
        config = config.model_copy(update={"out": self.folder.run(cell)})
        with Meter(self._device) as meter:
            try:
                result = finetune(config, resume=True, on_event=self._on_event, cancelled=self._cancelled)
            except DivergedError:
                result = None
        contents = read_journal(config.out / "journal")
        if result is None:
            return self._diverged(cell, config, contents, meter)
        return _done(cell, result, contents, meter, self.config.budget)

    def _diverged(self, cell: Cell, config: FinetuneConfig, contents: Contents, meter: Meter) -> Outcome:
        shutil.rmtree(config.out / "snapshots", ignore_errors=True)
        curve = _curve(contents)
        steps = len(contents.steps)
        forwards = contents.forwards
        return Outcome(
            cell=cell,
            status="diverged",
            metric_name=get_task(config.task).metric if config.task else "",
            steps=steps,
            forwards=forwards,
            examples=round(forwards * config.batch_size),
            seconds=curve[-1].seconds if curve else 0.0,
            peak_memory_bytes=meter.peak,
            mean_memory_bytes=meter.mean,
            data_hash=contents.header.data_hash if contents.header else None,
            curve=curve,
        )

    def _scored(self, cell: Cell, model: ModelSpec, spec: MethodSpec) -> Outcome:
        """Score the base on dev and test, with demonstrations or without."""
        # Not the dtype: runs are scored in the dtype that their weights are saved in, the base's.
        shared = {key: self.config.settings[key] for key in _SCORING if key in self.config.settings}
        batch_size = self.config.settings.get("eval_batch_size", EvalConfig.model_fields["batch_size"].default)
        given = EvalConfig(
            **shared,
            **self.config.place(cell.task),
            model=model.model,
            seed=cell.seed,
            demonstrations=spec.demonstrations if spec.method == IN_CONTEXT else 0,
            batch_size=batch_size,
        )
        with Meter(self._device) as meter:
            dev, test = (
                evaluate_model(given.model_copy(update={"split": split}), on_event=self._stopping)
                for split in ("dev", "test")
            )
        return Outcome(
            cell=cell,
            status="done",
            metric_name=test.metric_name,
            loss=dev.eval_loss,
            metric=dev.metric,
            test_loss=test.eval_loss,
            test_metric=test.metric,
            seconds=dev.seconds + test.seconds,
            peak_memory_bytes=meter.peak,
            mean_memory_bytes=meter.mean,
        )

    def _stopping(self, event: Event) -> None:
        """Pass on an event of an evaluation, and stop there if cancelled."""
        self._on_event(event)
        if self._cancelled():
            raise Interrupted("stopped while the base was scored; the same command goes on")


def _done(cell: Cell, result: FinetuneResult, contents: Contents, meter: Meter, budget: int) -> Outcome:
    assert contents.header is not None
    if result.eval_loss is None:
        raise DataError(f"{cell.task} has no dev rows, on which a comparison chooses learning rates; add a dev split")
    if result.forwards > budget:
        raise RunError(f"the run took {result.forwards} forward passes, more than the budget of {budget}")
    return Outcome(
        cell=cell,
        status="done",
        metric_name=result.metric_name,
        loss=result.eval_loss,
        metric=result.metric,
        test_loss=result.test_loss,
        test_metric=result.test_metric,
        steps=result.steps,
        kept_step=result.kept_step,
        forwards=result.forwards,
        examples=result.examples,
        tokens=result.tokens,
        seconds=result.seconds,
        peak_memory_bytes=meter.peak,
        mean_memory_bytes=meter.mean,
        data_hash=contents.header.data_hash,
        curve=_curve(contents),
    )


def _curve(contents: Contents) -> tuple[Point, ...]:
    return tuple(
        Point(
            step=line.step,
            forwards=contents.forwards_until(line.step),
            seconds=line.seconds,
            loss=line.loss,
            metric=line.metric,
        )
        for line in contents.evaluations
    )
