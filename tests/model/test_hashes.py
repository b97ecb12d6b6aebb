"""Hashes are cached for the same file alone, and a cache that is damaged or cannot be written stops nothing."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from zoft.model.hashes import file_digest
from zoft.registry import LocalStore


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"first")
    return tmp_path / "file"


def test_another_content_of_the_same_size_and_time_has_another_hash(file: Path) -> None:
    """As ``rsync -t`` and layers of images leave it: written in place, and replaced by another file."""
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    assert file_digest(file) == sha256(file)
    file.write_bytes(b"other")
    os.utime(file, ns=times)
    assert file_digest(file) == sha256(file)
    new = file.with_name("new")
    new.write_bytes(b"third")
    os.utime(new, ns=times)
    new.replace(file)
    assert file_digest(file) == sha256(file)


def test_an_unchanged_file_is_hashed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = file_digest(file)
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert file_digest(file) == first


@pytest.mark.parametrize("entry", [b"", b"ab" * 10, b"x" * 64, b"AB" * 32, b"ab" * 32 + b"\n", b"\xff" * 64])
def test_an_entry_that_is_not_a_digest_is_computed_again(file: Path, zoft_home: Path, entry: bytes) -> None:
    first = file_digest(file)
    (cached,) = (zoft_home / "hashes").iterdir()
    cached.write_bytes(entry)
    assert file_digest(file) == first and cached.read_text() == first


def test_a_cache_that_cannot_be_read_or_written_stops_nothing(
    file: Path, zoft_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_digest(file)
    (cached,) = (zoft_home / "hashes").iterdir()
    cached.unlink()
    cached.mkdir()
    (cached / "in the way").write_text("")
    assert file_digest(file) == sha256(file)
    shutil.rmtree(zoft_home)
    zoft_home.write_text("a file in place of the folder")
    assert file_digest(file) == sha256(file)
    monkeypatch.setenv("ZOFT_HOME", "/proc/nowhere")
    assert file_digest(file) == sha256(file) and LocalStore().entries() == []
