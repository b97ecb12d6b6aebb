"""Notices of libraries are silenced inside the contexts, and only there."""

from logging import ERROR, WARNING, getLogger

import pytest

from zoft.quiet import quiet_bitsandbytes


def test_bitsandbytes_is_quiet_while_it_is_imported() -> None:
    notices = getLogger("bitsandbytes.backends.cpu.ops")
    before = notices.getEffectiveLevel()
    with quiet_bitsandbytes():
        assert not notices.isEnabledFor(WARNING) and notices.isEnabledFor(ERROR)
    with pytest.raises(ImportError), quiet_bitsandbytes():
        raise ImportError
    assert notices.getEffectiveLevel() == before
