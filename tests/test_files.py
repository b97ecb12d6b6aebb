"""Files are written whole or not at all, with any number of writers at once, and killed writers leave nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zoft.errors import RunError
from zoft.files import locked, replacing, write_text

WRITER = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
os.getpid = lambda: 7  # as the first process of every container has
os.fsync = lambda descriptor: None  # 12,000 of them would take a minute
from zoft.files import write_text

def write(number):
    failed = 0
    for _ in range(3000):
        try:
            write_text(Path(sys.argv[1]), f"{number}" * 10_000)
        except Exception as error:
            failed += 1
    return failed

with ThreadPoolExecutor(2) as pool:
    print(sum(pool.map(write, range(2))))
"""


def test_writers_with_one_pid_and_in_threads_lose_nothing(tmp_path: Path) -> None:
    """Two processes with one PID, two threads in each, 12,000 writes of one file; it is whole at every moment."""
    file = tmp_path / "file"
    write_text(file, "0" * 10_000)
    command = [sys.executable, "-c", WRITER, str(file)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        text = file.read_text()
        assert len(text) == 10_000 and len(set(text)) == 1
    assert [writer.communicate()[0].strip() for writer in writers] == ["0", "0"]
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_writer_removes_its_own_temporary_file_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as first:
        first.write_text("first")
        with pytest.raises(ValueError), replacing(tmp_path / "file") as second:
            second.write_text("half")
            raise ValueError
        assert not second.exists()
    assert (tmp_path / "file").read_text() == "first" and first.name != second.name


def test_the_folder_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def observed(descriptor: int) -> None:
        flushed.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), (tmp_path / "file").exists()))
        fsync(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", observed)
    write_text(tmp_path / "file", "text")
    (temporary, before), folder = flushed
    assert temporary.endswith(".tmp") and not before and folder == (str(tmp_path), True)


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    killed = "import os, sys; from pathlib import Path; from zoft.files import replacing\n" + (
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.mkdir() if sys.argv[2] == 'folder' else temporary.write_text('half')\n"
        "    os._exit(9)"
    )
    for path, kind in (("a", "file"), ("model", "folder"), ("snapshots/b", "file"), ("x" * 250, "file")):
        process = subprocess.run([sys.executable, "-c", killed, str(tmp_path / path), kind], check=False)
        assert process.returncode == 9
    assert len(list(tmp_path.rglob(".*.tmp"))) == 4
    mine = [tmp_path / name for name in (".mine.tmp", "a.tmp", ".mine.0123.tmp")]
    for file in mine:
        file.write_text("mine")
    with locked(tmp_path):
        assert sorted(tmp_path.rglob("*.tmp")) == sorted(mine)


def test_an_error_of_the_system_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "inside").write_text("")
    with pytest.raises(RunError, match=r"cannot write .*file: "):
        write_text(tmp_path / "file", "text")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
