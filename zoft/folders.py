"""Folders that long jobs work in: a lock, JSON files, rows of JSON, and a check that the settings are the same."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from zoft.errors import RunError
from zoft.files import locked, write_text


class Folder:
    """A folder that a job works in; the job can be stopped and resumed.

    Args:
        path: the folder; `locked` makes it.
        restart: what to do if one of its files is damaged, the end of an error message.
    """

    def __init__(self, path: Path, *, restart: str = "start again with --force") -> None:
        self.path, self._restart = path, restart

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder for one process; a second process gets a `RunError`."""
        return locked(self.path)

    def check_same(self, stored: Mapping[str, Any], given: Mapping[str, Any], *, holds: str, advice: str) -> None:
        """Raise `RunError` if a setting in ``given`` has another value in ``stored``, those the folder began with.

        Args:
            stored: settings by name; a name that is missing counts as None.
            given: settings of the present call by name, those that must not change.
            holds: what the folder holds, for the message: "a run".
            advice: what to do about it, the end of the message.
        """
        different = [
            f"{key} is {stored.get(key)!r} there, {value!r} here"
            for key, value in given.items()
            if stored.get(key) != value
        ]
        if different:
            raise RunError(f"{self.path} holds {holds} with other settings ({'; '.join(different)}); {advice}")

    def read_json(self, file: Path) -> dict[str, Any]:
        """Return the JSON object in ``file``."""
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{file} is not a JSON object ({error}); {self._restart}") from error

    def write_json(self, file: Path, values: Mapping[str, Any], *, indent: int = 2) -> None:
        """Replace ``file`` by ``values`` as a JSON object, whole or not at all."""
        write_text(file, json.dumps(values, indent=indent) + "\n")

    def rows(self, file: Path) -> list[dict[str, Any]]:
        """Return the whole rows of a ``.jsonl`` file, JSON objects: without a torn last line and damaged ones.

        Rows are kept for people, or to save work that can be done again, so a damaged one never stops a job.
        """
        if not file.is_file():
            return []
        try:
            lines = file.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise RunError(f"cannot read {file}: {error.strerror}; {self._restart}") from error
        return [row for row in map(_row, lines) if row is not None]

    def add_row(self, file: Path, row: Mapping[str, Any]) -> None:
        """Append one row to a ``.jsonl`` file; a torn last line is cut off before."""
        try:
            with file.open("ab+") as handle:
                _cut_torn_line(handle)
                handle.write((json.dumps(row) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write {file}: {error.strerror}; free some space, then --resume") from error

    def write_rows(self, file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace a ``.jsonl`` file by ``rows``, whole or not at all."""
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def delete(*paths: Path) -> None:
        """Delete files and folders, those that exist."""
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _row(line: bytes) -> dict[str, Any] | None:
    """The JSON object of ``line``; None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut what follows the last newline of ``file``, left by a kill, a power cut or a full disk."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
