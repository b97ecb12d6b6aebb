import io

import pytest
from rich.console import Console

from zoft.cli import progress
from zoft.cli.output import Output
from zoft.cli.progress import Display
from zoft.events import Evaluated, MetaStarted, MetaStepDone, Progress, Started, StepDone, TrialDone, Warned

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


def test_a_meta_training_reports_its_mean_gain_and_its_trials(plain):
    display, clock, file = plain
    display(STARTED)
    display(step(1, loss=9.0))  # of a run before, which is no gain
    display(MetaStarted(20, 40, "m", ("copa", "rte"), blocks=9, parameters=1000, networks=70))
    for number in range(21, 41):
        clock[0] += 1.0
        gain, skipped = (float("nan"), True) if number == 30 else (1e-4 if number % 2 else 3e-4, False)
        display(MetaStepDone(number, 40, "copa", 0.7, gain, 1e-5, 0.5, 2.0, forwards=8 * number, skipped=skipped))
    display(TrialDone(3, 20, "energy", "copa", 3e-5, 40, 0.7, 0.5))
    lines = file.getvalue().splitlines()
    assert lines[-5] == "a tuner for m: 1,000 weights in 9 blocks, resumed after step 20"
    assert lines[-4] == "70 weights of networks, learned on copa, rte"
    assert lines[-3].startswith("point 35/40  gain +1.9e-04 a step  lr 1.0e-05  s 0.50 to 2.00  280 forwards  0:05")
    assert lines[-2].startswith("point 40/40  gain +1.9e-04 a step")
    assert lines[-1] == "test 3 of 20: energy at lr 3.0e-05 on copa, 40 forwards: loss 0.7000 -> 0.5000"


def test_evaluations_and_warnings_are_reported(plain):
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
    assert "resumed after step 30" in file.getvalue()
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
