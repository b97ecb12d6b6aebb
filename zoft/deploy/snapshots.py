"""Snapshots of a run: weights and optimizer state after a step, so that resuming replays only later steps.

A file's metadata hold the step, the journal's checksum after that step, and a digest over both and all tensors. A file
of zoft 0.1 has the SHA-256 of the weights alone.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zoft.errors import ModelError, RunError, shown
from zoft.files import replacing
from zoft.model.checkpoint import DTYPES, StoredTensor, file_tensors, read_into, write_file
from zoft.optim import RecordOptimizer
from zoft.weights.blocks import Block

_NAME = re.compile(r"step-(\d{8})\.safetensors")


def weights_sha256(blocks: Sequence[Block]) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every block, in order."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(f"{block.name} {block.parameter.dtype} {list(block.shape)}\n".encode())
        digest.update(block.parameter.detach().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Snapshots:
    """The snapshots in ``folder``: files ``step-00000100.safetensors`` with weights and optimizer state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Return the steps of the snapshots there are, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for file in self.folder.iterdir() if (match := _NAME.fullmatch(file.name)))

    def save(self, step: int, optimizer: RecordOptimizer, journal: int | None = None) -> None:
        """Write the snapshot of the present weights, after ``step`` steps; ``journal``: its checksum there."""
        with replacing(self._path(step)) as temporary:
            write_file(temporary, _state(optimizer), metadata=_metadata(step, optimizer, journal))

    def load(self, step: int, optimizer: RecordOptimizer, journal: int | None = None) -> None:
        """Read the snapshot of ``step`` into the weights and the optimizer; ``journal``: its checksum there.

        Raises:
            RunError: the file is damaged, or is of another model, run or step; weights and state are then undefined.
        """
        path = self._path(step)
        optimizer.forget()
        try:
            with safe_open(path, framework="pt") as file:
                stored_metadata = dict(file.metadata() or {})
            blocks = {block.name: block for block in optimizer.blocks}
            for stored in file_tensors(path):
                state, _, name = stored.name.rpartition(" of ")
                read_into(stored, _place(optimizer, blocks[name], state, stored))
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, ModelError) as error:
            raise RunError(f"{path} is damaged or of another model ({error})") from error
        _check(path, stored_metadata, _metadata(step, optimizer, journal))
        optimizer.step_number = step

    def keep_only(self, steps: set[int]) -> None:
        """Delete the snapshots of all other steps."""
        for step in set(self.steps()) - steps:
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"


def _metadata(step: int, optimizer: RecordOptimizer, journal: int | None) -> dict[str, str]:
    """What a snapshot of the present weights and state has as metadata."""
    weights = weights_sha256(optimizer.blocks)
    facts = {"sha256": weights, "step": str(step), "journal": "" if journal is None else f"{journal:08x}"}
    digest = hashlib.sha256(repr(facts).encode())
    parameters = {block.name for block in optimizer.blocks}
    for name, tensor in sorted(_state(optimizer).items()):
        if name not in parameters:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return {**facts, "digest": digest.hexdigest()}


def _check(path: Path, stored: dict[str, str], here: dict[str, str]) -> None:
    """Raise `RunError` unless the metadata ``stored`` in a snapshot agree with those of what was read, ``here``."""
    stored.pop("format", None)
    if stored.get("sha256") != here["sha256"]:
        raise RunError(f"{path} is damaged: its weights do not have the SHA-256 it was written with")
    if set(stored) == {"sha256"}:
        return  # of zoft 0.1
    if stored.get("step") != here["step"] or stored.get("journal") != here["journal"]:
        raise RunError(
            f"{path} is damaged or of another run: it was written at step {shown(stored.get('step'))} of a journal "
            f"with checksum {shown(stored.get('journal'))}, expected step {here['step']} and {here['journal']}"
        )
    if stored.get("digest") != here["digest"]:
        raise RunError(f"{path} is damaged: its optimizer state does not have the SHA-256 it was written with")


def _state(optimizer: RecordOptimizer) -> dict[str, torch.Tensor]:
    """Weights by block name, and optimizer state by ``<state> of <block name>``."""
    tensors: dict[str, torch.Tensor] = {block.name: block.parameter for block in optimizer.blocks}
    for block in optimizer.blocks:
        for key, value in optimizer.state[block.parameter].items():
            tensors[f"{key} of {block.name}"] = value
    return tensors


def _place(optimizer: RecordOptimizer, block: Block, state: str, stored: StoredTensor) -> torch.Tensor:
    """The tensor that ``stored`` is read into: the weights of ``block``, or a new one among its optimizer state."""
    if not state:
        return block.parameter.detach()
    new = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device=block.parameter.device)
    optimizer.state[block.parameter][state] = new
    return new
