"""The folder of a job: its lock, rows that a crash tore, and settings that must not change."""

from pathlib import Path

import pytest

from zoft.errors import RunError
from zoft.folders import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_rows_are_appended_replaced_and_read_without_a_torn_line(folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert folder.rows(file) == []
    folder.write_rows(file, [{"step": 1}])
    folder.add_row(file, {"step": 2})
    with file.open("a") as handle:
        handle.write('{"step": 3')
    assert folder.rows(file) == [{"step": 1}, {"step": 2}]
    folder.add_row(file, {"step": 4})
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 4}\n', "the torn line is cut before"
    for damaged in (b'{"step": ', b"[1]", b"\xff\xfe", b"\x00" * 50, b"[" * 100_000):
        file.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n' + damaged)
        assert folder.rows(file) == [{"step": 1}, {"step": 2}]
    file.write_bytes(b"\x00" * 50)
    folder.add_row(file, {"step": 1})
    assert file.read_text() == '{"step": 1}\n'
    with pytest.raises(RunError, match=r"cannot write .*free some space, then --resume"):
        folder.add_row(tmp_path / "missing" / "rows.jsonl", {})


def test_settings_that_differ_are_all_named(folder: Folder, tmp_path: Path) -> None:
    folder.check_same({"seed": 0, "lr": 1.0, "old": 1}, {"seed": 0, "new": None}, holds="a run", advice="")
    with pytest.raises(RunError) as raised:
        folder.check_same({"seed": 0}, {"seed": 1, "lr": 2.0}, holds="a run", advice="choose another --out")
    assert str(raised.value) == (
        f"{tmp_path} holds a run with other settings (seed is 0 there, 1 here; lr is None there, 2.0 here); "
        "choose another --out"
    )


def test_a_json_object_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder, file = Folder(tmp_path, restart="restore it"), tmp_path / "a.json"
    folder.write_json(file, {"a": [1]})
    assert folder.read_json(file) == {"a": [1]} and file.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    for text in ("[1]", "{"):
        file.write_text(text)
        with pytest.raises(RunError, match=r"a\.json is not a JSON object .*; restore it"):
            folder.read_json(file)


def test_a_folder_is_held_by_one_process_and_cleared_of_what_is_named(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (tmp_path / "snapshots").mkdir()
    with folder.locked(), pytest.raises(RunError, match="in use by another process"), Folder(tmp_path).locked():
        pass
    folder.delete(tmp_path / "snapshots", tmp_path / "journal")
    assert (tmp_path / "mine").exists() and not (tmp_path / "snapshots").exists()
