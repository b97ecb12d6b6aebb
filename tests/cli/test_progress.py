import io

import pytest
from rich.console import Console

from zoft.cli import progress
from zoft.cli.output import Output
from zoft.cli.progress import Display
from zoft.deploy.events import Evaluated, Progress, Started, StepDone, Warned

STARTED = Started(0, 40, "m", "sst2", "mezo", blocks=9, parameters=1000, train=8, dev=4, test=0)


@pytest.fixture
def plain(monkeypatch):
    """A display that writes to no terminal, and a clock that it reads."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    output = Output(False)
    output.stderr = Console(file=io.StringIO(), width=200)
    return Display(output), clock, output.stderr.file


def step(number: int, loss: float = 1.0, skipped: bool = False) -> StepDone:
    return StepDone(number, 40, loss, 1e-6, forwards=2 * number, skipped=skipped)


def test_without_a_terminal_a_line_now_and_then(plain):
    display, clock, file = plain
    display(STARTED)
    for number in range(1, 41):
        clock[0] += 1.0
        display(step(number))
    lines = [line for line in file.getvalue().splitlines() if line.startswith("step")]
    assert [line.split("  ")[0] for line in lines] == ["step 15/40", "step 30/40", "step 40/40"]
    assert lines[0] == "step 15/40  loss 1.0000  1.00 steps/s  30 forwards  0:25 left"


def test_the_loss_is_a_mean_over_recent_steps_that_were_taken(plain):
    display, _, file = plain
    display(STARTED)
    for number in range(1, 21):
        display(step(number, loss=5.0))
    for number in range(21, 40):
        display(step(number, loss=1.0))
    display(step(40, loss=float("nan"), skipped=True))
    assert "loss 1.2000" in file.getvalue()  # (5 + 19 * 1) / 20


def test_evaluations_and_warnings_are_told(plain):
    display, _, file = plain
    display(Evaluated(10, "dev", 0.51234, 0.75, "accuracy", kept=True))
    display(Evaluated(10, "test", 0.6, None, "none", kept=True))
    display(Warned("3 rows were truncated"))
    assert file.getvalue().splitlines() == [
        "step 10: dev loss 0.5123, accuracy 0.750  (best)",
        "step 10: test loss 0.6000",
        "warning: 3 rows were truncated",
    ]


def test_a_resumed_run_counts_its_rate_from_where_it_goes_on(plain):
    display, clock, file = plain
    display(Started(30, 40, "m", "sst2", "mezo", blocks=9, parameters=1000, train=8, dev=4, test=0))
    clock[0] = 20.0
    display(step(40))
    assert "going on after step 30" in file.getvalue()
    assert "0.50 steps/s" in file.getvalue()


def test_on_a_terminal_bars_come_and_go():
    output = Output(False)
    output.stderr = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Display(output) as display:
        assert not display.started
        display(Progress("loading", 0, 1))
        display(STARTED)
        display(step(3))
        display(Progress("evaluating dev", 1, 4))
        bars = display._bars.progress
        assert [task.description for task in bars.tasks] == ["steps", "evaluating dev"]
        assert (bars.tasks[0].completed, bars.tasks[0].total) == (3, 40)
        assert display.started
        display(Progress("evaluating dev", 4, 4))
        assert [task.description for task in bars.tasks] == ["steps"]
        display(step(40))
        assert bars.tasks == []
