"""Display of events on stderr: progress bars on a terminal, a plain line every 15 seconds elsewhere."""

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zoft import events
from zoft.cli.output import Output
from zoft.compare.cells import CellDone, CellFailed, CellStarted, CompareEvent
from zoft.events import MetaEvent, MetaStarted, MetaStepDone, TrialDone

SECONDS_BETWEEN_LINES = 15.0
# Names of the main bars: of a fine-tuning, a meta-training and a comparison.
STEPS, POINTS, RUNS = "steps", "points", "runs"
STEPS_AVERAGED = 20  # losses of single batches are noisy


class Display:
    """Listener that shows the events of `zoft.deploy`, `zoft.metatrain` and `zoft.compare`; a context manager."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._live = output.stderr.is_terminal
        self._bars = _Bars(output) if self._live else None
        self._recent: deque[float] = deque(maxlen=STEPS_AVERAGED)
        self._began, self._first_step, self._last_line = 0.0, 0, 0.0
        self._comparing, self._warned = False, set[str]()
        self.started = False  # whether training began; from then on a run can be saved

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.progress.stop()

    def __call__(self, event: CompareEvent | MetaEvent) -> None:
        """Draw one event."""
        match event:
            case CellStarted():
                self._start_cell(event)
            case CellDone():
                self._output.note(f"{event.done}/{event.total} {_cell(event)}")
            case CellFailed():
                self._output.warn(f"{event.cell.name}: {event.why}")
            case _ if self._comparing and self._hidden(event):
                pass
            case events.Started():
                self._start(event)
            case events.StepDone():
                self._step(event)
            case MetaStarted():
                self._start_meta(event)
            case MetaStepDone():
                self._point(event)
            case TrialDone():
                self._output.note(_trial(event))
            case events.Evaluated():
                self._output.note(_evaluation(event))
            case events.Progress():
                self._phase(event)
            case events.Warned():
                self._output.warn(event.message)
            case events.Noted():
                self._output.note(event.message)

    def _start_cell(self, event: CellStarted) -> None:
        self._comparing = True
        if self._bars:
            self._bars.draw(RUNS, event.done, event.total, event.cell.name)

    def _hidden(self, event: CompareEvent | MetaEvent) -> bool:
        """Whether to hide an event of a run within a comparison: a bar shows progress, a warning is shown once."""
        if isinstance(event, events.Warned):
            known = event.message in self._warned
            self._warned.add(event.message)
            return known
        if isinstance(event, events.Started):
            self._recent.clear()
            self._began, self._first_step = time.monotonic(), event.step
            return True
        return not self._live or isinstance(event, events.Evaluated | events.Noted)

    def _start(self, event: events.Started) -> None:
        self._begin(
            event.step,
            f"{event.method} on {event.model}: {event.parameters:,} weights in {event.blocks} blocks",
            f"{event.task}: {event.train:,} train, {event.dev:,} dev, {event.test:,} test examples",
        )

    def _start_meta(self, event: MetaStarted) -> None:
        self._begin(
            event.step,
            f"a tuner for {event.model}: {event.parameters:,} weights in {event.blocks} blocks",
            f"{event.networks:,} weights of networks, learned on {', '.join(event.tasks) or 'nothing'}",
        )

    def _begin(self, step: int, first: str, second: str) -> None:
        self.started = True
        self._recent.clear()
        self._began, self._first_step, self._last_line = time.monotonic(), step, time.monotonic()
        resumed = f", resumed after step {step:,}" if step else ""
        self._output.note(f"{first}{resumed}\n{second}")

    def _step(self, event: events.StepDone) -> None:
        if not event.skipped:
            self._recent.append(event.loss)
        rate = self._rate(event.step)
        status = f"loss {self._mean():.4f}  {rate:.2f} steps/s  {event.forwards:,} forwards"
        self._advance(STEPS, "step", event.step, event.steps, status)

    def _point(self, event: MetaStepDone) -> None:
        if not event.skipped:
            self._recent.append(event.gain)
        status = (
            f"gain {self._mean():+.1e} a step  lr {event.lr:.1e}  s {event.lowest:.2f} to {event.highest:.2f}  "
            f"{event.forwards:,} forwards"
        )
        self._advance(POINTS, "point", event.step, event.steps, status)

    def _mean(self) -> float:
        return sum(self._recent) / len(self._recent) if self._recent else float("nan")

    def _rate(self, step: int) -> float:
        """Steps per second."""
        return (step - self._first_step) / max(time.monotonic() - self._began, 1e-9)

    def _advance(self, bar: str, unit: str, step: int, steps: int, status: str) -> None:
        """Move the main bar; without a terminal, print a line every `SECONDS_BETWEEN_LINES`."""
        now = time.monotonic()
        if self._bars:
            self._bars.draw(bar, step, steps, status)
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or step == steps:
            self._last_line = now
            left = _duration((steps - step) / self._rate(step))
            self._output.note(f"{unit} {step:,}/{steps:,}  {status}  {left} left")

    def _phase(self, event: events.Progress) -> None:
        if self._bars:
            self._bars.draw(event.phase, event.done, event.total)
            return
        now = time.monotonic()
        if event.total == 1 and event.done == 0:  # a phase without countable progress
            self._output.note(event.phase)
        elif event.done < event.total and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._output.note(f"{event.phase}  {event.done:,}/{event.total:,}")


class _Bars:
    """The main bar and, below it, that of the current phase; a full bar disappears."""

    def __init__(self, output: Output) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=output.stderr,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def draw(self, phase: str, done: int, total: int, status: str = "") -> None:
        """Show that ``phase`` is at ``done`` of ``total``, and remove the bar of any other phase."""
        for other in [name for name in self._bars if name not in (phase, STEPS, POINTS, RUNS)]:
            self.progress.remove_task(self._bars.pop(other))
        if phase not in self._bars:
            self._bars[phase] = self.progress.add_task(phase, total=total, status=status)
        self.progress.update(self._bars[phase], completed=done, total=total, status=status)
        if done >= total:
            self.progress.remove_task(self._bars.pop(phase))


def _evaluation(event: events.Evaluated) -> str:
    metric = "" if event.metric is None else f", {event.metric_name} {event.metric:.3f}"
    kept = "  (best)" if event.kept and event.split == "dev" else ""
    return f"step {event.step:,}: {event.split} loss {event.loss:.4f}{metric}{kept}"


def _cell(event: CellDone) -> str:
    outcome = event.outcome
    if outcome.loss is None:
        return f"{outcome.cell.name}: diverged"
    metric = "" if outcome.metric is None else f", {outcome.metric_name} {outcome.metric:.3f}"
    start = f"{outcome.curve[0].loss:.4f} -> " if outcome.curve else ""
    return f"{outcome.cell.name}: dev loss {start}{outcome.loss:.4f}{metric}, {_duration(outcome.seconds)}"


def _trial(event: TrialDone) -> str:
    return (
        f"test {event.done} of {event.total}: {event.name} at lr {event.lr:.1e} on {event.task}, "
        f"{event.forwards} forwards: loss {event.loss_start:.4f} -> {event.loss:.4f}"
    )


def _duration(seconds: float) -> str:
    """Return ``seconds`` as hours, minutes and seconds.

    >>> _duration(75), _duration(3725)
    ('1:15', '1:02:05')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
