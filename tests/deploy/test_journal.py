"""The journal: what is written is read back; a torn tail is cut, any other damage is found."""

import base64
import errno
import json
import math
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoft.deploy.header import check_base
from zoft.deploy.journal import (
    FORMAT,
    Contents,
    EndLine,
    EvalLine,
    HeaderLine,
    Journal,
    ProjectionLine,
    StepLine,
    read_journal,
)
from zoft.errors import RunError
from zoft.optim import ProjectionRecord, StepRecord

HEADER = HeaderLine(
    base="org/model",
    base_hash="ab" * 32,
    data_hash="cd" * 32,
    config={"seed": 7},
    lr=1e-6,
    eps=1e-3,
    dtype="float32",
    device="cpu",
    threads=2,
    noise="table-3",
    versions={"zoft": "0"},
)
RECORDS = [
    StepRecord(0, 7, (1e-6,), 1e-3, ((1.25, 1.0),)),
    StepRecord(1, 7, (1e-6, 2e-6), 1e-3, ((0.1, 0.3), (math.inf, 2.0)), scales=(1.0, 0.5, 2.25)),
    StepRecord(2, 7, (1e-6,), 1e-3, ((1 / 3, 2 / 3),), extra={"kappa": 0.1}),
]


def write(path: Path, records: list[StepRecord] = RECORDS, end: bool = False) -> bytes:
    journal = Journal(path)
    journal.append(HEADER)
    for record in records:
        journal.append(StepLine.of(record))
        journal.append(EvalLine(step=record.step + 1, loss=0.5, metric=None, kept=True, seconds=1.0))
    if end:
        journal.append(EndLine(kept=1, sha256="00", result={"steps": len(records)}))
    journal.close()
    return path.read_bytes()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "journal", end=True)
    contents = read_journal(tmp_path / "journal")
    assert contents.header == HEADER
    assert contents.steps == RECORDS
    assert [line.step for line in contents.evaluations] == [1, 2, 3]
    assert contents.end is not None and contents.end.kept == 1
    assert contents.steps[1].skipped and not contents.steps[0].skipped


floats = st.floats(allow_nan=False)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(floats, floats), min_size=1, max_size=3),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)),
)
def test_numbers_come_back_exactly(losses: list[tuple[float, float]], scales: list[float]) -> None:
    record = StepRecord(0, 3, (0.1,), 0.1, tuple(losses), tuple(scales) or None)
    line = StepLine.model_validate_json(StepLine.of(record).model_dump_json(exclude_none=True))
    assert line.record(seed=3) == record


def rewritten(path: Path, number: int, change: dict[str, object]) -> None:
    """Change values in a line of the journal, with all checksums right again."""
    payloads = [json.loads(line[9:]) for line in path.read_bytes().splitlines()]
    payloads[number] |= change
    checksum, lines = 0, []
    for payload in payloads:
        text = json.dumps(payload).encode()
        checksum = zlib.crc32(text, checksum)
        lines.append(b"%08x %s\n" % (checksum, text))
    path.write_bytes(b"".join(lines))


INFINITE = base64.b64encode(struct.pack("<f", math.inf)).decode()


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, {"lr": math.nan}, "header.lr: Input should be a finite number"),
        (0, {"eps": 0.0}, "header.eps: Input should be greater than 0"),
        (0, {"threads": 10**9}, "header.threads"),
        (0, {"config": {"seed": "x"}}, "seed is not a number"),
        (0, {"config": {"seed": 1, "method": ["mezo"]}}, "or method is not a name"),
        (0, {"\x1b[2J": 1}, r"header.\\x1b\[2J: Extra inputs are not permitted"),
        (1, {"lr": [math.inf]}, "step.lr.0: Input should be a finite number"),
        (1, {"losses": []}, "step.losses: List should have at least 1 item"),
        (1, {"eps": -1.0}, "step.eps"),
        (1, {"scales": INFINITE}, "not base64 of finite float32 numbers"),
        (2, {"metric": math.nan}, "eval.metric"),
    ],
)
def test_numbers_that_no_run_has_are_refused(tmp_path: Path, number: int, change: dict, message: str) -> None:
    write(tmp_path / "journal")
    rewritten(tmp_path / "journal", number, change)
    with pytest.raises(RunError, match=message) as caught:
        read_journal(tmp_path / "journal")
    assert str(caught.value).isprintable()


def test_scales_of_a_step_that_was_not_taken_may_be_infinite(tmp_path: Path) -> None:
    write(tmp_path / "journal")
    rewritten(tmp_path / "journal", 3, {"scales": INFINITE})
    assert read_journal(tmp_path / "journal").steps[1].scales == (math.inf,)


def test_every_cut_is_read_up_to_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = write(path)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        contents = read_journal(path)
        assert contents.size == len(whole[:length].rpartition(b"\n")[0]) + (b"\n" in whole[:length])


def test_going_on_after_a_torn_tail_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = write(path, RECORDS[:1])
    path.write_bytes(whole + b'deadbeef {"kind":"step","st')
    contents = read_journal(path)
    journal = Journal(path, contents)
    for record in RECORDS[1:]:
        journal.append(StepLine.of(record))
        journal.append(EvalLine(step=record.step + 1, loss=0.5, metric=None, kept=True, seconds=1.0))
    journal.close()
    assert path.read_bytes() == write(tmp_path / "unbroken")


def test_any_changed_byte_before_the_last_line_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    whole = write(path)
    last = whole.rstrip(b"\n").rindex(b"\n")
    for position in range(0, last, 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"journal.*(damaged|did not write this journal)"):
            read_journal(path)


@pytest.mark.parametrize("edit", [lambda lines: lines[:2] + lines[3:], lambda lines: [*lines[:1], lines[2], lines[1]]])
def test_a_lost_or_moved_line_is_found(tmp_path: Path, edit) -> None:
    path = tmp_path / "journal"
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*edit(lines[:4]), *lines[4:]]))
    with pytest.raises(RunError, match="damaged"):
        read_journal(path)


def test_steps_must_follow_each_other(tmp_path: Path) -> None:
    write(tmp_path / "journal", [RECORDS[0], RECORDS[2]])
    with pytest.raises(RunError, match="found step 2, expected step 1"):
        read_journal(tmp_path / "journal")


def test_a_newer_format_is_refused_politely(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append(HEADER.model_copy(update={"format": FORMAT + 1}))
    journal.close()
    with pytest.raises(RunError, match="upgrade zoft"):
        read_journal(tmp_path / "journal")


@pytest.mark.parametrize(
    "junk", [b"", b"\n", b"hello\n", b"\x00" * 100, b"00000000 {}\n", b'8d4eeb8e {"kind":"step"}\n']
)
def test_a_file_with_no_whole_header_holds_no_run(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "journal").write_bytes(junk)
    assert read_journal(tmp_path / "journal").header is None


def test_an_endless_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(RunError, match="longer than"):
        read_journal(tmp_path / "journal")


def test_a_full_disk_is_reported_and_leaves_a_journal_that_can_be_resumed(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "journal"
    write(path, RECORDS[:1])
    journal = Journal(path, read_journal(path))
    real_write = os.write

    def half_write(file: int, data: bytes) -> int:
        return real_write(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half_write)
    with pytest.raises(RunError, match=r"no space left.*--resume"):
        journal.append(StepLine.of(RECORDS[1]))

    def no_write(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", no_write)
    with pytest.raises(RunError, match=r"No space left on device.*--resume"):
        journal.append(StepLine.of(RECORDS[1]))
    monkeypatch.undo()
    assert read_journal(path).steps == RECORDS[:1]


def test_an_unwritable_place_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write"):
        Journal(tmp_path / "absent" / "journal", Contents())


def test_a_journal_of_format_1_is_read(tmp_path: Path) -> None:
    """Lines as version 1 wrote them: no sides, no forwards, extra of single numbers."""
    lines = [
        b'{"kind":"header","format":1,"base":"m","base_hash":"h","config":{"seed":7},"lr":0.001,"eps":0.001,'
        b'"dtype":"float32","device":"cpu","threads":1,"noise":"table-1","versions":{}}',
        b'{"kind":"step","step":0,"lr":[0.001],"eps":0.001,"losses":[[1.5,1.25],["nan",1.0]],"extra":{"k":0.5}}',
        b'{"kind":"eval","step":1,"loss":1.0,"kept":true,"seconds":1.0}',
    ]
    checksum, raw = 0, b""
    for line in lines:
        checksum = zlib.crc32(line, checksum)
        raw += b"%08x %s\n" % (checksum, line)
    (tmp_path / "journal").write_bytes(raw)
    contents = read_journal(tmp_path / "journal")
    (record,) = contents.steps
    assert (record.seed, record.sides, record.forwards, record.extra) == (7, 2, 4, {"k": 0.5})
    assert record.skipped and contents.forwards == 4 and contents.kept_step == 1


def test_a_projection_follows_its_step_and_travels_whole(tmp_path: Path) -> None:
    projection = ProjectionRecord(0, (0.1 + 0.2, 1.0), (1e-3, 2.0), (1.0, float("nan")), 4)
    journal = Journal(tmp_path / "journal")
    journal.append(HEADER)
    journal.append(StepLine.of(RECORDS[0]))
    journal.append(ProjectionLine.of(projection))
    read = read_journal(tmp_path / "journal")
    assert repr(read.projections[0]) == repr(projection)
    assert list(read.records(0, 1)) == [read.steps[0], read.projections[0]]
    assert read.forwards == RECORDS[0].forwards + 4
    journal.append(ProjectionLine.of(projection))
    journal.close()
    with pytest.raises(RunError, match="line 4: a projection of step 0 after step 0"):
        read_journal(tmp_path / "journal")


def test_a_journal_of_another_noise_is_refused() -> None:
    check_base(HEADER, "org/model", HEADER.base_hash)
    with pytest.raises(RunError, match=r"version 'table-2', this zoft draws 'table-3'.*use the version of zoft.*\(0\)"):
        check_base(HEADER.model_copy(update={"noise": "table-2"}), "org/model", HEADER.base_hash)


def test_a_second_writer_stops_with_a_message(tmp_path: Path) -> None:
    """One that finds the file longer, shorter, changed in its last line or replaced stops, in all orders of writing."""
    path = tmp_path / "journal"
    lines = [StepLine.of(record) for record in RECORDS]
    other = EvalLine(step=1, loss=0.25, kept=True, seconds=2.0)

    def begun() -> Journal:
        write(path, RECORDS[:1])
        return Journal(path, read_journal(path))

    changed = pytest.raises(RunError, match=r"journal was changed by another process.*second run writes to .*--out")
    first = begun()
    second = Journal(path, read_journal(path))
    first.append(lines[1])
    with changed:
        second.append(other)
    first.append(lines[2])
    assert read_journal(path).steps == RECORDS, "the first loses nothing"
    second = Journal(path, read_journal(path))
    second.append(other)
    with changed:
        first.append(other)
    for harm in (lambda: path.write_bytes(b""), path.unlink, lambda: path.write_bytes(b"x" * path.stat().st_size)):
        first = begun()
        first.append(lines[1])
        harm()
        with changed:
            first.append(lines[2])


def test_a_race_of_two_writers_leaves_a_journal_that_can_be_resumed(tmp_path: Path, monkeypatch) -> None:
    """Both have looked at the end before either writes: the second line follows the first, and both stop."""
    path = tmp_path / "journal"
    write(path, RECORDS[:1])
    first, second = (Journal(path, read_journal(path)) for _ in range(2))
    monkeypatch.setattr(Journal, "_check_end", lambda journal: None)
    first.append(StepLine.of(RECORDS[1]))
    second.append(StepLine.of(RECORDS[1]))
    monkeypatch.undo()
    for journal in (first, second):
        with pytest.raises(RunError, match="changed by another process"):
            journal.append(StepLine.of(RECORDS[2]))
    assert read_journal(path).steps == RECORDS[:2]
