"""A short run of ``python -m benchmarks.fuzz``, and proof that it would notice a reader that breaks."""

import random

import pytest

from benchmarks.fuzz import run
from benchmarks.fuzz.mutate import damage_value
from benchmarks.fuzz.run import KINDS, fuzz, limited_memory


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    report = fuzz(kind, 600, seed=1)
    assert report.failures == []
    assert report.outcomes["refused"] > 200 and sum(report.outcomes.values()) == 600


def test_a_reader_that_breaks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "read_journal", lambda path: {}["missing"])
    assert len(fuzz("journal", 5).failures) == 5


def test_memory_is_limited() -> None:
    with limited_memory(100_000_000), pytest.raises(MemoryError):
        bytearray(500_000_000)


def test_values_are_changed() -> None:
    value = {"a": [1, {"b": 2}], "c": "d"}
    changed = [damage_value(value, random.Random(i)) for i in range(50)]
    assert value == {"a": [1, {"b": 2}], "c": "d"} and sum(one != value for one in changed) > 40
