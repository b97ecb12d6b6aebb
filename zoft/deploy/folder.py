"""The folder of a run: what it holds, who may write to it, and whether a run can start or go on there."""

import itertools
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zoft.deploy.config import FinetuneConfig
from zoft.deploy.journal import Contents, read_journal
from zoft.deploy.snapshots import Snapshots
from zoft.errors import RunError
from zoft.files import replacing, write_text
from zoft.folders import Folder
from zoft.registry import Card

# Fields that may change when a run goes on: the content of model and data is compared by hash (`zoft.deploy.header`).
# Method and tuner may be left open; what is named is compared in `zoft.deploy.choice`.
_FREE = {"model", "data", "out", "device", "device_map", "method", "tuner", "trust", "keep_model"}
# As they are where they are left open: the method has its own, and the date is that of the beginning.
_OPEN: dict[str, Any] = {"probes": None, "options": {}, "exact_lr": None, "date": None}
# What replaces a setting that the version that began a run did not know.
_ABSENT = _OPEN | {"graphs": False, "exact": "none", "body": "zo"}


class RunFolder(Folder):
    """``config.json``, ``tuner.safetensors``, ``journal``, ``snapshots/``, ``metrics.jsonl``, ``model/`` of one run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.journal = path / "journal"
        self.config = path / "config.json"
        self.tuner = path / "tuner.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.model = path / "model"
        self.snapshots = Snapshots(path / "snapshots")

    def open(self, config: FinetuneConfig, *, resume: bool, force: bool, salvage: bool = False) -> Contents:
        """Return what the journal holds so far: nothing for a new run.

        With ``salvage`` a damaged journal is cut before the damage; the file is kept beside it under another name.

        Raises:
            RunError: the folder holds something else, a run that was not asked to go on, or a different run.
        """
        if force:
            self.delete(self.journal, self.config, self.tuner, self.metrics, self.snapshots.folder, self.model)
            self.delete(*self.path.glob("journal.damaged-*"))
        proven = salvage and resume
        contents = read_journal(self.journal, proven=proven) if self.journal.is_file() else Contents()
        if contents.header is None:
            if not all(_from_a_beginning(file) for file in self.path.iterdir()):
                raise RunError(f"{self.path} is not empty and holds no run; choose another --out")
            return Contents()
        if not resume:
            at = "finished" if contents.end else f"at step {len(contents.steps)}"
            raise RunError(
                f"{self.path} holds a run already ({at}); go on with --resume, start again with --force, "
                "or choose another --out"
            )
        self.check_same(
            _ABSENT | contents.header.config,
            _fixed(config),
            holds="a run",
            advice="resume with the settings it had, or choose another --out",
        )
        if proven:
            self._cut_damage(contents)
        return contents

    def _cut_damage(self, contents: Contents) -> None:
        """Keep a copy of a journal that goes on after ``contents``, and delete the snapshots of later steps."""
        whole = self.journal.read_bytes()
        if len(whole) == contents.size:
            return
        numbers = itertools.count(1)
        copy = next(file for n in numbers if not (file := self.path / f"journal.damaged-{n}").exists())
        with replacing(copy) as temporary:
            temporary.write_bytes(whole)
        steps = self.snapshots.steps()
        self.snapshots.keep_only({step for step in steps if step <= len(contents.steps)})

    def write_config(self, config: FinetuneConfig) -> None:
        """Write the resolved configuration."""
        write_text(self.config, config.model_dump_json(indent=2) + "\n")

    def write_tuner(self, card: Card) -> None:
        """Copy the card that drives the run into the folder; resuming reads this copy."""
        card.save(self.tuner)

    def read_tuner(self, digest: str) -> Card:
        """Return the card that the run began with; `RunError` if it is missing or another."""
        if not self.tuner.is_file():
            raise RunError(f"{self.tuner} is missing, the card that drives this run; put the card {digest[:16]} there")
        card = Card.load(self.tuner)
        if card.digest != digest:
            raise RunError(
                f"{self.tuner} is the card {card.digest[:16]}, the run began with {digest[:16]}; put that one there"
            )
        return card

    def rewrite_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replace the metrics by ``rows``, one JSON object a line."""
        self.write_rows(self.metrics, rows)

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Append one row to the metrics."""
        self.add_row(self.metrics, row)

    def remove_model(self) -> None:
        """Delete the checkpoint; the base and the journal give it again."""
        self.delete(self.model)


def stored_settings(run: Path) -> dict[str, Any] | None:
    """Return the settings of the run in the folder ``run``, None if it holds none that can be read.

    They are read from the journal, whose checksums show a damage. ``config.json`` is a copy for people; it counts where
    the journal has no header yet, and for the settings that may change, such as the place of the model.
    """
    folder = RunFolder(run)
    try:
        copy = folder.read_json(folder.config)
    except RunError:
        copy = {}
    header = read_journal(folder.journal, proven=True).header if folder.journal.is_file() else None
    if header is None:
        return copy or None
    try:
        FinetuneConfig.model_validate({**header.config, **_chosen(copy)})
    except ValidationError:
        copy = {}
    return {**header.config, **_chosen(copy), "out": str(run)}


def _chosen(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in _FREE - {"method", "tuner"}}


def _from_a_beginning(file: Path) -> bool:
    """Whether ``file`` may stand in the folder of a run that died before its journal had a whole header."""
    return file.name in (".lock", "journal", "config.json", "tuner.safetensors") or (
        file.name.startswith((".config.json.", ".tuner.safetensors.")) and file.suffix == ".tmp"
    )


def _fixed(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that must not change when a run is resumed: neither free nor left open."""
    given = config.model_dump(mode="json")
    return {
        key: value for key, value in given.items() if key not in _FREE and not (key in _OPEN and value == _OPEN[key])
    }
