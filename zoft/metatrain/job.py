"""The folder of a meta-training, ``CARD.run``: any process that can read it can watch, cancel and resume the job."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from zoft.errors import RunError
from zoft.folders import Folder
from zoft.metatrain.config import MetatrainConfig

logger = logging.getLogger(__name__)

# Settings that may change when a job is resumed: the content of the model is compared by its hash.
_FREE = {"model", "data", "out", "device", "device_map"}


class JobFolder(Folder):
    """Its files: configuration, status, events, metrics of every point, runs of the evidence, a snapshot, ``cancel``.

    The status is ``{"state": "running" | "stopped" | "failed" | "finished", "step": .., "steps": .., ..}``. A file
    ``cancel`` in the folder, empty or not, stops the job after the current point.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.config = path / "config.json"
        self.status = path / "status.json"
        self.events = path / "events.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.evidence = path / "evidence.jsonl"
        self.cancel = path / "cancel"
        self.snapshots = path / "snapshots"

    @classmethod
    def of(cls, card: Path) -> "JobFolder":
        """The folder of the job that writes ``card``."""
        return cls(card.with_name(f"{card.name}.run"))

    def open(self, config: MetatrainConfig, base_hash: str, *, resume: bool, force: bool) -> dict[str, Any] | None:
        """Start or resume the job; return its result if it is finished.

        Raises:
            RunError: the folder or the card exists already, or the folder holds a different job.
        """
        if config.card_file.is_dir():
            raise RunError(f"{config.card_file} is a folder; expected the name of a file for the card, as --out")
        if force:
            self.clear()
        self.cancel.unlink(missing_ok=True)
        if not self.config.is_file():
            if config.card_file.exists() and not force:
                raise RunError(f"{config.card_file} exists already; choose another --out, or overwrite it with --force")
            self.write_json(self.config, {"base_hash": base_hash, "config": config.stored()})
            return None
        status = self._status()
        if not resume:
            raise RunError(
                f"{self.path} holds a meta-training already ({status.get('state', 'begun')}); go on with --resume, "
                "start again with --force, or choose another --out"
            )
        self._check_same(config, base_hash)
        result = status.get("result")
        return result if status.get("state") == "finished" and isinstance(result, dict) else None

    def write_status(self, state: str, **facts: Any) -> None:
        """Write the state of the job, for other processes; a status that cannot be written does not stop the job."""
        try:
            self.write_json(self.status, {"state": state, **facts})
        except RunError as error:
            logger.warning("%s; the job goes on without", error)

    def cut_metrics(self, step: int) -> None:
        """Remove the metrics of points from ``step`` on, which are about to be taken again."""
        rows = self.rows(self.metrics)
        self.write_rows(
            self.metrics, [row for row in rows if isinstance(row.get("step"), int) and 0 < row["step"] <= step]
        )

    def snapshot(self, step: int) -> Path:
        """The file of the snapshot at the reset before point ``step``."""
        return self.snapshots / f"reset-{step:08d}.safetensors"

    def all_snapshots(self) -> list[Path]:
        """The snapshots, the newest first."""
        return sorted(self.snapshots.glob("reset-*.safetensors"), reverse=True)

    def identity_of(self, snapshot: Path) -> str:
        """Return what identifies ``snapshot``: the SHA-256 of the job's stored configuration, and the point."""
        stored = json.dumps(self.read_json(self.config), sort_keys=True)
        return f"{hashlib.sha256(stored.encode()).hexdigest()} {snapshot.stem}"

    def keep_only(self, step: int) -> None:
        """Delete the snapshots of other resets."""
        for file in self.snapshots.glob("reset-*.safetensors"):
            if file != self.snapshot(step):
                file.unlink()

    def clear(self) -> None:
        """Delete what a job wrote, and nothing else."""
        self.delete(self.config, self.status, self.events, self.metrics, self.evidence, self.snapshots)

    def _status(self) -> dict[str, Any]:
        """The stored status; empty if it is missing or damaged, since all it says can be found again."""
        try:
            return self.read_json(self.status) if self.status.is_file() else {}
        except RunError:
            return {}

    def _check_same(self, config: MetatrainConfig, base_hash: str) -> None:
        stored = self.read_json(self.config)
        if stored.get("base_hash") != base_hash:
            raise RunError(f"the base has changed since {self.path} was begun; restore it, or start again with --force")
        self.check_same(
            config.renamed(stored.get("config", {})),
            config.model_dump(mode="json", exclude=_FREE),
            holds="a meta-training",
            advice="resume with the settings it had, or choose another --out",
        )


def stored_config(model: str | None, out: Path | None) -> Path | None:
    """Return the configuration file of the job that writes the card ``out``, None if there is none to resume.

    Args:
        model: names the card where ``out`` is None.
        out: card file of the job.

    Raises:
        RunError: there is no job, and no ``model`` that a new one could start from.
    """
    if out is None and model is None:
        return None
    file = JobFolder.of(MetatrainConfig(model=model or "", steps=0, out=out).card_file).config
    if file.is_file():
        return file
    if model is None:
        raise RunError(f"{file.parent} holds no meta-training to resume; start one: zoft metatrain MODEL --out {out}")
    return None
