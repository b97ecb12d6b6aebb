import json
import math
from pathlib import Path

from zoft.cli.output import Output


def test_a_result_for_people_is_aligned_and_skips_what_does_not_apply(capsys):
    Output(False).result({}, {"loss": 0.123456, "model": Path("runs/x"), "test loss": None, "weights": 1234567})
    assert capsys.readouterr().out == "loss     0.1235\nmodel    runs/x\nweights  1,234,567\n"


def test_a_result_for_machines_is_one_line_of_json_without_what_does_not_apply(capsys):
    Output(True).result({"loss": math.nan, "path": Path("a"), "lr": 1e-6, "absent": None, "rows": [{"f1": None}]}, {})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"path": "a", "lr": 1e-6, "rows": [{}]}
    assert captured.out.count("\n") == 1 and captured.err == ""


def test_rows_are_a_table_or_json(capsys):
    rows = [{"name": "mezo", "lr": 1e-6}, {"name": "other", "lr": None}]
    Output(False).rows("methods", rows)
    table = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table] == [["name", "lr"], ["mezo", "1e-06"], ["other"]]
    Output(True).rows("methods", rows)
    assert json.loads(capsys.readouterr().out)["methods"][0] == {"name": "mezo", "lr": 1e-6}


def test_all_else_goes_to_stderr_and_brackets_survive(capsys):
    output = Output(True)
    output.note("a [bold]path[/bold]")
    output.warn("careful")
    output.table(["", "after"], [["loss", 0.5]])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[:2] == ["a [bold]path[/bold]", "warning: careful"]
    assert captured.err.split()[-2:] == ["loss", "0.5"]
