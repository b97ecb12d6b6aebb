"""The folder of a meta-training, ``FILE.run``: whoever can list folders can watch, cancel and resume it."""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from zoft.errors import RunError
from zoft.files import locked, write_text
from zoft.metatrain.config import MetatrainConfig

# Fields that may change when a job goes on: the content of the model is compared by its hash.
_FREE = {"model", "data", "out", "device", "device_map"}


class JobFolder:
    """Its files: configuration, status, events, metrics of every point, runs of the evidence, a snapshot, ``cancel``.

    The status is ``{"state": "running" | "stopped" | "failed" | "finished", "step": .., "steps": .., ..}``; a file
    ``cancel`` in the folder, empty or not, stops the job after the point that it is at.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.status = path / "status.json"
        self.events = path / "events.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.evidence = path / "evidence.jsonl"
        self.cancel = path / "cancel"
        self.snapshots = path / "snapshots"

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder for one process; another that tries gets a `RunError`."""
        return locked(self.path)

    def open(self, config: MetatrainConfig, base_hash: str, *, resume: bool, force: bool) -> dict[str, Any] | None:
        """Begin or go on; return the result where the job is finished.

        Raises:
            RunError: the folder or the card is there already, or the job there is a different one.
        """
        if config.card_file.is_dir():
            raise RunError(f"{config.card_file} is a folder; expected the name of a file for the card, as --out")
        if force:
            self.clear()
        self.cancel.unlink(missing_ok=True)
        if not self.config.is_file():
            if config.card_file.exists() and not force:
                raise RunError(f"{config.card_file} exists already; choose another --out, or overwrite it with --force")
            stored = {"base_hash": base_hash, "config": config.model_dump(mode="json")}
            write_text(self.config, json.dumps(stored, indent=2) + "\n")
            return None
        if not resume:
            raise RunError(
                f"{self.path} holds a meta-training already ({self._state()}); go on with --resume, start again with "
                "--force, or choose another --out"
            )
        self._check_same(config, base_hash)
        status = _read_json(self.status) if self.status.is_file() else {}
        return status["result"] if status.get("state") == "finished" else None

    def write_status(self, state: str, **facts: Any) -> None:
        """Say where the job is."""
        write_text(self.status, json.dumps({"state": state, **facts}, indent=2) + "\n")

    def add(self, file: Path, row: dict[str, Any]) -> None:
        """Append a row to one of the ``.jsonl`` files."""
        try:
            with file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {file}: {error.strerror}; free some space, then --resume") from error

    def rows(self, file: Path) -> list[dict[str, Any]]:
        """The rows of one of the ``.jsonl`` files; a torn last line is left out."""
        if not file.is_file():
            return []
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); start again with --force") from error

    def cut_metrics(self, step: int) -> None:
        """Forget the metrics of points from ``step`` on, which are about to be taken again."""
        kept = [row for row in self.rows(self.metrics) if row["step"] <= step]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def snapshot(self, step: int) -> Path:
        """The file of the snapshot at the reset before point ``step``."""
        return self.snapshots / f"reset-{step:08d}.safetensors"

    def last_snapshot(self) -> Path | None:
        """The newest snapshot."""
        return max(self.snapshots.glob("reset-*.safetensors"), default=None)

    def keep_only(self, step: int) -> None:
        """Delete the snapshots of other resets."""
        for file in self.snapshots.glob("reset-*.safetensors"):
            if file != self.snapshot(step):
                file.unlink()

    def clear(self) -> None:
        """Delete what a job wrote, and nothing else."""
        for file in (self.config, self.status, self.events, self.metrics, self.evidence):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.snapshots, ignore_errors=True)

    def _state(self) -> str:
        status = _read_json(self.status) if self.status.is_file() else {}
        return str(status.get("state", "begun"))

    def _check_same(self, config: MetatrainConfig, base_hash: str) -> None:
        stored = _read_json(self.config)
        if stored.get("base_hash") != base_hash:
            raise RunError(f"the base has changed since {self.path} was begun; restore it, or start again with --force")
        before = stored.get("config", {})
        different = [
            f"{key} is {before.get(key)!r} there, {value!r} here"
            for key, value in config.model_dump(mode="json").items()
            if key not in _FREE and before.get(key) != value
        ]
        if different:
            raise RunError(
                f"{self.path} holds a meta-training with other settings ({'; '.join(different)}); "
                "resume with the settings it had, or choose another --out"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{file} cannot be read ({error}); start again with --force") from error
