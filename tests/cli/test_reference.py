import json
from pathlib import Path

from typer.main import get_command

from zoft.cli import options, reference
from zoft.cli.app import app

CLI = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_fields_are_up_to_date():
    assert options.FIELDS.read_text(encoding="utf-8") == reference.fields(), "run `make docs`"


def test_the_reference_is_up_to_date():
    assert CLI.read_text(encoding="utf-8") == reference.reference(), "run `make docs`"


def test_the_reference_covers_every_command_in_80_columns():
    text = reference.reference()
    for name in get_command(app).commands:
        assert f"## `zoft {name}`" in text and f"Usage: zoft {name}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_check_finds_a_stale_file(tmp_path, capsys):
    file = tmp_path / "cli.md"
    assert reference.main(["--check", str(file)]) == 1
    assert "make docs" in capsys.readouterr().err
    assert reference.main([str(file)]) == 0
    assert reference.main(["--check", str(file)]) == 0
    file.write_text(json.dumps("stale"))
    assert reference.main(["--check", str(file)]) == 1
