import signal

import pytest

from zoft.cli.interrupt import stopping
from zoft.cli.output import Output


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
