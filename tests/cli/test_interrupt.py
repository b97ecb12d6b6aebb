import signal

import pytest

from zoft.cli.interrupt import stopping
from zoft.cli.output import Output


@pytest.fixture(autouse=True)
def heeded():
    """Ctrl-C as Python takes it by default, even where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_interrupt_asks_and_the_second_stops(capsys):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopping(Output(False), lambda: True) as cancelled:
        assert not cancelled()
        signal.raise_signal(signal.SIGINT)
        assert cancelled()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "saved" in capsys.readouterr().err


def test_with_nothing_to_save_the_first_interrupt_stops():
    with pytest.raises(KeyboardInterrupt), stopping(Output(False), lambda: False):
        signal.raise_signal(signal.SIGINT)


def test_a_process_that_ignores_interrupts_goes_on_doing_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping(Output(False), lambda: True) as cancelled:
        signal.raise_signal(signal.SIGINT)
        assert not cancelled()
