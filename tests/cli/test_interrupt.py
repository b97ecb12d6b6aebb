import os
import signal
import subprocess
import sys
import time
import weakref

import pytest

from zoft.cli.interrupt import stopping
from zoft.cli.output import Output


@pytest.fixture(autouse=True)
def heeded():
    """Both signals as Python takes them by default, even where the tests were started with them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_the_first_interrupt_asks_and_the_second_stops(capsys, number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stopping(Output(False), lambda: True) as cancelled:
        assert not cancelled()
        signal.raise_signal(number)
        assert cancelled()
        signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert "saved" in capsys.readouterr().err


@SIGNALS
def test_with_nothing_to_save_the_first_interrupt_stops(number):
    with pytest.raises(KeyboardInterrupt), stopping(Output(False), lambda: False):
        signal.raise_signal(number)


@SIGNALS
def test_a_process_that_ignores_interrupts_goes_on_doing_so(number):
    signal.signal(number, signal.SIG_IGN)
    with stopping(Output(False), lambda: True) as cancelled:
        signal.raise_signal(number)
        assert not cancelled()


class Deleted:
    """Gets a signal in ``__del__``, where Python reports an exception and goes on."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@SIGNALS
@pytest.mark.parametrize("place", ["__del__", "callback"])
def test_an_interrupt_that_python_swallows_is_raised_again(number, place):
    """In ``__del__`` and in the callback of a weak reference, before there is anything to save."""
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), stopping(Output(False), lambda: False) as cancelled:
        if place == "__del__":
            Deleted(number)
        else:
            thing = type("Thing", (), {})()
            reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
            del thing
            assert reference() is None
        assert cancelled(), "a run that polls in the meantime stops, too"
        time.sleep(5)
    assert sys.unraisablehook is before


def test_a_swallowed_interrupt_of_a_run_that_can_be_saved_stops_it(capsys):
    with stopping(Output(False), lambda: True) as cancelled:
        Deleted(signal.SIGINT)
        assert cancelled()
        time.sleep(0.1)
    assert "saved" in capsys.readouterr().err


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path):
    """A command without anything to save: it waits for a FIFO, gets the signal and exits with 130, as at Ctrl-C."""
    os.mkfifo(tmp_path / "rows.jsonl")
    code = "import sys; print('ready', file=sys.stderr, flush=True); from zoft.cli.app import main; main()"
    command = [sys.executable, "-c", code, "eval", "model", "--config", str(tmp_path / "rows.jsonl")]
    codes = []
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
        with (tmp_path / "rows.jsonl").open("w"):  # opens when the command reads, so that it is running
            process.send_signal(number)
            process.communicate(timeout=60)
        codes.append(process.returncode)
    assert codes == [130, 130]


def heeding() -> None:
    """Have Ctrl-C as by default in the process that is started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
