"""Snapshots that are damaged, of another run or of another step are passed over, and never taken for the right one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from zoft.deploy import Event, FinetuneConfig, Warned, finetune
from zoft.deploy.journal import read_journal
from zoft.deploy.snapshots import Snapshots
from zoft.model.checkpoint import file_tensors

from .conftest import same, stopped_at, with_


def snapshot_of(run: Path) -> Path:
    folder = Snapshots(run / "snapshots")
    return folder.folder / f"step-{folder.steps()[-1]:08d}.safetensors"


def warnings_of(config: FinetuneConfig) -> list[str]:
    """Resume the run; return its warnings of snapshots."""
    events: list[Event] = []
    finetune(config, resume=True, on_event=events.append)
    return [event.message for event in events if isinstance(event, Warned) and "step-0" in event.message]


def flipped(name: str) -> Callable[[Path], None]:
    """Flip one bit in the first tensor whose name contains ``name``."""

    def damage(file: Path) -> None:
        stored = next(tensor for tensor in file_tensors(file) if name in tensor.name)
        content = bytearray(file.read_bytes())
        content[stored.offset + stored.length // 2] ^= 1
        file.write_bytes(content)

    return damage


def zeroed_page(file: Path) -> None:
    """Zero a page within the optimizer state."""
    stored = max((t for t in file_tensors(file) if " of " in t.name), key=lambda tensor: tensor.length)
    content = bytearray(file.read_bytes())
    assert any(content[stored.offset : stored.offset + min(4096, stored.length)])
    content[stored.offset : stored.offset + min(4096, stored.length)] = bytes(min(4096, stored.length))
    file.write_bytes(content)


def renamed_state(file: Path) -> None:
    """Change one letter of the name of an optimizer state."""
    name = next(tensor.name for tensor in file_tensors(file) if " of " in tensor.name)
    file.write_bytes(file.read_bytes().replace(f'"{name}"'.encode(), f'"X{name[1:]}"'.encode(), 1))


def renamed_metadata(file: Path) -> None:
    """Change one letter of the digest's key, as a file of an earlier release lacks it."""
    file.write_bytes(file.read_bytes().replace(b'"digest"', b'"digesu"', 1))


DAMAGES = [flipped(" of "), flipped("embed_tokens"), zeroed_page, renamed_state, renamed_metadata]


@pytest.fixture
def adam(config: FinetuneConfig) -> FinetuneConfig:
    return with_(config, method="mezo-adam", lr=1e-4, steps=10, eval_every=5, snapshot_every=4)


@pytest.fixture
def stopped(adam: FinetuneConfig, tmp_path: Path) -> FinetuneConfig:
    """A run stopped at step 6, and the same one uninterrupted in ``whole``."""
    finetune(with_(adam, out=tmp_path / "whole"))
    stopped_at(adam, 6)
    return adam


def test_every_damage_is_found_and_the_run_ends_in_the_same_weights(stopped: FinetuneConfig, tmp_path: Path) -> None:
    for number, damage in enumerate(DAMAGES):
        copy = with_(stopped, out=tmp_path / f"copy{number}")
        shutil.copytree(stopped.out, copy.out)
        damage(snapshot_of(copy.out))
        assert any("damaged" in warning for warning in warnings_of(copy)), damage
        assert same(tmp_path / "whole", copy.out), damage


def test_a_snapshot_of_another_run_or_step_is_passed_over(stopped: FinetuneConfig, tmp_path: Path) -> None:
    other = with_(stopped, seed=1, out=tmp_path / "other")
    stopped_at(other, 6)
    step, run = with_(stopped, out=tmp_path / "step"), with_(stopped, out=tmp_path / "copied")
    for copy in (step, run):
        shutil.copytree(stopped.out, copy.out)
    shutil.copy(snapshot_of(other.out), snapshot_of(run.out))
    newest = snapshot_of(step.out).rename(step.out / "newest")
    shutil.rmtree(step.out / "snapshots")
    (step.out / "snapshots").mkdir()
    newest.rename(step.out / "snapshots" / "step-00000004.safetensors")
    for copy in (step, run):
        assert any("of another run" in warning for warning in warnings_of(copy))
        assert same(tmp_path / "whole", copy.out)


def test_a_snapshot_without_a_digest_is_accepted_as_before(stopped: FinetuneConfig, tmp_path: Path) -> None:
    file = snapshot_of(stopped.out)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert set(metadata) == {"format", "sha256", "step", "journal", "digest"}
    assert int(metadata["journal"], 16) == read_journal(stopped.out / "journal").checksums[int(metadata["step"])]
    content = file.read_bytes()
    for key in ("step", "journal", "digest"):  # replaced by spaces, which JSON ignores
        entry = f',"{key}":"{metadata[key]}"'.encode()
        assert content.count(entry) == 1
        content = content.replace(entry, b" " * len(entry))
    file.write_bytes(content)
    assert warnings_of(stopped) == [] and same(tmp_path / "whole", stopped.out)
