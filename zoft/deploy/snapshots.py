"""Snapshots of a run: weights and optimizer state after a step, so that resuming replays only later steps."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zoft.errors import ModelError, RunError
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

    def save(self, step: int, optimizer: RecordOptimizer) -> None:
        """Write the snapshot of the present weights, after ``step`` steps."""
        with replacing(self._path(step)) as temporary:
            write_file(temporary, _state(optimizer), metadata={"sha256": weights_sha256(optimizer.blocks)})

    def load(self, step: int, optimizer: RecordOptimizer) -> None:
        """Read the snapshot of ``step`` into the weights and the optimizer.

        Raises:
            RunError: the file is damaged, or is of another model.
        """
        path = self._path(step)
        optimizer.forget()
        try:
            with safe_open(path, framework="pt") as file:
                expected = (file.metadata() or {}).get("sha256")
            blocks = {block.name: block for block in optimizer.blocks}
            for stored in file_tensors(path):
                state, _, name = stored.name.rpartition(" of ")
                read_into(stored, _place(optimizer, blocks[name], state, stored))
        except (SafetensorError, OSError, KeyError, ModelError) as error:
            raise RunError(f"{path} is damaged or of another model ({error})") from error
        if weights_sha256(optimizer.blocks) != expected:
            raise RunError(f"{path} is damaged: its weights do not have the SHA-256 it was written with")
        optimizer.step_number = step

    def keep_only(self, steps: set[int]) -> None:
        """Delete the snapshots of all other steps."""
        for step in set(self.steps()) - steps:
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"


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
