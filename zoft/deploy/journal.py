"""The journal of a run: an append-only file that determines, with the base weights, the weights after every step.

One line per record, ``CRC32 JSON\n``. The checksum of a line continues that of the line before, so any lost, moved or
changed line is detected. A line is a single write; an incomplete last one, left by a kill or a power cut, is cut off on
opening. Lines: a header, then steps and evaluations, at the end a summary. Reading executes nothing and holds one line
of bounded length at a time.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from zoft.deploy.journal_lines import (
    FORMAT,
    LINES,
    EndLine,
    EvalLine,
    HeaderLine,
    Line,
    ProjectionLine,
    StepLine,
    TunerUsed,
)
from zoft.errors import RunError, shown
from zoft.optim import ProjectionRecord, Record, StepRecord

__all__ = [
    "FORMAT",
    "Contents",
    "EndLine",
    "EvalLine",
    "HeaderLine",
    "Journal",
    "ProjectionLine",
    "StepLine",
    "TunerUsed",
    "read_journal",
]

MAX_LINE = 2**20  # bytes; 150,000 blocks fit


@dataclass
class Contents:
    """The records of a journal; ``size``: bytes up to the last complete line, ``checksum``: that line's checksum.

    ``checksums``: by number of steps, the checksum of the last line of these steps' records.
    """

    header: HeaderLine | None = None
    steps: list[StepRecord] = field(default_factory=list)
    projections: dict[int, ProjectionRecord] = field(default_factory=dict)  # by the step that they follow
    evaluations: list[EvalLine] = field(default_factory=list)
    end: EndLine | None = None
    size: int = 0
    checksum: int = 0
    checksums: dict[int, int] = field(default_factory=dict)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yield the records of steps ``start`` to ``stop``, each followed by its projection."""
        for record in self.steps[start:stop]:
            yield record
            if record.step in self.projections:
                yield self.projections[record.step]

    def forwards_of(self, step: int) -> float:
        """Return the forward passes that ``step`` took, including its projection."""
        projection = self.projections.get(step)
        return self.steps[step].forwards + (projection.forwards if projection else 0)

    @property
    def kept_step(self) -> int:
        """The step whose weights are kept: best on dev, the last without a dev split."""
        kept = [line.step for line in self.evaluations if line.kept]
        return kept[-1] if kept else len(self.steps)

    def forwards_until(self, steps: int) -> float:
        """Return the forward passes of the first ``steps`` steps."""
        return sum(self.forwards_of(step) for step in range(steps))

    @property
    def forwards(self) -> float:
        """The forward passes of all steps."""
        return self.forwards_until(len(self.steps))


def read_journal(path: Path, *, proven: bool = False) -> Contents:
    """Return the records of the journal at ``path``; an incomplete last line is ignored.

    With ``proven`` the records before the first damage are returned, which the chain of checksums proves.

    Raises:
        RunError: the file cannot be read, is damaged before its last line, or was written by a newer zoft.
    """
    contents = Contents()
    for number, (raw, last) in enumerate(_raw_lines(path), start=1):
        text = _checked(raw, contents.checksum)
        if text is None:
            if last or proven:
                return contents
            raise RunError(
                f"{path}, line {number}: damaged (its checksum does not continue that of the line before), and "
                f"further records follow; {_advice(contents, number)}"
            )
        line = _parse(text, path, number)
        _take(contents, line, path, number)
        contents.size += len(raw)
        contents.checksum = int(raw[:8], 16)
        if isinstance(line, StepLine | ProjectionLine):
            contents.checksums[line.step + 1] = contents.checksum
    return contents


class Journal:
    """Append lines to the journal at ``path``, after the ``contents`` that `read_journal` returned."""

    def __init__(self, path: Path, contents: Contents | None = None) -> None:
        contents = contents or Contents()
        self.path = path
        self.checksum = contents.checksum  # of the last line
        self._start, self._size, self._last = 0, contents.size, b""  # where the last line begins and ends, and how
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, contents.size)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error

    def append(self, line: Line) -> None:
        """Write ``line`` in one write. A full disk is a `RunError`; an incomplete line is cut off on opening.

        The file has to end where this process left it, with the bytes that it wrote last: where locks have no effect,
        as on some network file systems, that is how a second writer is found.
        """
        self._check_end()
        payload = line.model_dump_json(exclude_none=True).encode()
        checksum = zlib.crc32(payload, self.checksum)
        raw = b"%08x %s\n" % (checksum, payload)
        try:
            written = os.write(self._file, raw)
        except OSError as error:
            raise self._failed(error.strerror or str(error)) from error
        if written < len(raw):
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise self._failed("no space left on device")
        self.checksum, self._last = checksum, raw[:8]
        self._start, self._size = self._size, self._size + len(raw)

    def flush(self) -> None:
        """Force the appended lines to the disk, so that they survive a power cut."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _check_end(self) -> None:
        try:
            with self.path.open("rb", buffering=0) as file:  # opened anew: a network file system then asks its server
                size = os.fstat(file.fileno()).st_size
                file.seek(self._start)
                last = file.read(len(self._last))
        except OSError as error:
            raise self._second(error.strerror or str(error)) from error
        if (size, last) != (self._size, self._last):
            raise self._second(f"it has {size} bytes, this process left {self._size}")

    def _second(self, found: str) -> RunError:
        return RunError(
            f"{self.path} was changed by another process ({found}): a second run writes to {self.path.parent}; stop "
            "one of the two, then --resume, or choose another --out"
        )

    def _failed(self, why: str) -> RunError:
        return RunError(f"cannot write {self.path}: {why}; free some space, then --resume (nothing is lost)")


def _advice(contents: Contents, number: int) -> str:
    """What to do about a journal that is damaged in line ``number``, after ``contents``."""
    if contents.header is None:
        return "nothing before it is proven; restore the file from a copy, or start again with --force"
    return (
        f"the {len(contents.steps)} steps up to line {number - 1} are proven; restore the file from a copy, go on from "
        f"step {len(contents.steps)} with --resume --salvage (the damaged file is kept beside), or start again with "
        "--force"
    )


def _raw_lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield every line with its newline, and whether it is the last."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while raw := file.readline(MAX_LINE):
                if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
                    raise RunError(f"{path} is not a journal: it has a line longer than {MAX_LINE} bytes")
                yield raw, file.tell() == size
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def _checked(raw: bytes, checksum: int) -> bytes | None:
    """Return the payload of a complete line with the right checksum, else None."""
    if not raw.endswith(b"\n") or raw[8:9] != b" ":
        return None
    payload = raw[9:-1]
    return payload if raw[:8] == b"%08x" % zlib.crc32(payload, checksum) else None


def _parse(text: bytes, path: Path, number: int) -> Line:
    try:
        return LINES.validate_json(text)
    except ValidationError as error:
        written_by = _format_of(text)
        if written_by > FORMAT:
            raise RunError(
                f"{path} has journal format {written_by}, this zoft reads up to {FORMAT}; upgrade zoft"
            ) from error
        first = error.errors()[0]
        place = shown(".".join(str(part) for part in first["loc"]) or "the line")
        what = shown(first["msg"], 200)
        raise RunError(f"{path}, line {number}: {place}: {what}; zoft did not write this journal") from error


def _format_of(text: bytes) -> int:
    try:
        value = json.loads(text).get("format", 0)
    except (ValueError, AttributeError, RecursionError):
        return 0
    return value if isinstance(value, int) else 0


def _take(contents: Contents, line: Line, path: Path, number: int) -> None:
    """Add a line to ``contents``; `RunError` where the order of the lines is wrong."""
    expected_step = len(contents.steps)
    if isinstance(line, HeaderLine) != (number == 1):
        raise RunError(f"{path}, line {number}: a {line.kind} record in place of the header, or a second header")
    if isinstance(line, HeaderLine):
        if line.format > FORMAT:
            raise RunError(f"{path} has journal format {line.format}, this zoft reads up to {FORMAT}; upgrade zoft")
        contents.header = line
    elif contents.end is not None:
        raise RunError(f"{path}, line {number}: a {line.kind} record after the end of the run")
    elif isinstance(line, EndLine):
        contents.end = line
    elif isinstance(line, EvalLine):
        contents.evaluations.append(line)
    elif isinstance(line, ProjectionLine):
        if line.step != expected_step - 1 or line.step in contents.projections:
            raise RunError(f"{path}, line {number}: a projection of step {line.step} after step {expected_step - 1}")
        contents.projections[line.step] = line.record()
    elif line.step != expected_step:
        raise RunError(f"{path}, line {number}: found step {line.step}, expected step {expected_step}")
    else:
        assert contents.header is not None
        contents.steps.append(_record(line, contents.header, path, number))


def _record(line: StepLine, header: HeaderLine, path: Path, number: int) -> StepRecord:
    try:
        return line.record(header.seed)
    except ValueError as error:
        what = "scales or exact gradients are not base64 of finite float32 numbers"
        raise RunError(f"{path}, line {number}: {what}") from error
