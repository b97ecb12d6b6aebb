import functools
import json
import os
import signal
import subprocess
import sys

import pytest

import zoft as package
from tests.cli.conftest import ZOFT
from zoft.cli import info
from zoft.cli.errors import explain
from zoft.errors import Interrupted, ModelError


def test_version(zoft):
    result = zoft("--version")
    assert (result.exit_code, result.stdout) == (0, f"zoft {package.__version__}\n")


def test_no_arguments_shows_the_help(zoft):
    assert "Usage: zoft [OPTIONS] COMMAND" in zoft().output


@pytest.mark.parametrize(
    "arguments",
    [
        ("finetune", "model", "--stpes", "3"),
        ("finetune", "model", "--steps", "three"),
        ("finetune", "model", "--dtype", "fp8"),
        ("finetune", "--task", "sst2"),
        ("eval", "--data", "rows.jsonl"),
        ("replay", "base"),
        ("fingerprnt", "model"),
        ("--jsno",),
    ],
)
def test_wrong_usage_exits_with_2_with_a_message_on_stderr(zoft, arguments):
    result = zoft(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: zoft" in result.stderr and "Error: " in result.stderr


def test_a_mistaken_command_or_flag_is_met_with_the_right_one(zoft):
    assert "--steps" in zoft("finetune", "model", "--stpes", "3").stderr
    assert "fingerprint" in zoft("fingerprnt", "model").stderr


def test_an_error_is_one_message_without_traceback(zoft_process):
    result = zoft_process("fingerprint", "./no-such-folder", "--json")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("zoft: error: ./no-such-folder does not exist")
    assert "Traceback" not in result.stderr


def test_debugging_adds_the_traceback(zoft, monkeypatch):
    monkeypatch.setenv("ZOFT_DEBUG", "1")
    result = zoft("fingerprint", "./no-such-folder")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "zoft: error: ./no-such-folder does not exist" in result.stderr


def test_a_saved_interruption_exits_with_130(zoft, monkeypatch):
    def interrupted(as_json):
        raise Interrupted("stopped after step 3")

    monkeypatch.setattr(info.Output, "rows", lambda *_: interrupted(False))
    result = zoft("tasks")
    assert result.exit_code == 130
    assert result.stderr == "zoft: stopped after step 3\n"


def test_a_bug_keeps_its_traceback(zoft, monkeypatch):
    monkeypatch.setattr(info.Output, "rows", lambda *_: {}["missing"])
    assert isinstance(zoft("tasks").exception, KeyError)


def started(command):
    """A process that heeds Ctrl-C, even where the tests themselves were started with it ignored."""
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def test_an_interrupt_exits_with_130(rows, model_folder):
    """Ctrl-C while the model loads: there is nothing to save yet, so it stops at once."""
    command = [*ZOFT, "eval", str(model_folder), "--data", str(rows)]
    process = started(command)
    assert process.stderr.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "")


def test_an_interrupted_run_is_saved_and_names_resume(rows, model_folder, tmp_path):
    command = [*ZOFT, "finetune", str(model_folder), "--data", str(rows)]
    command += ["--steps", "100000", "--out", str(tmp_path / "run")]
    process = started(command)
    lines = iter(process.stderr.readline, "")
    assert any(line.startswith("step 0: dev loss") for line in lines)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err
    assert any((tmp_path / "run" / "snapshots").iterdir())


def test_results_go_to_stdout_and_nothing_else(zoft_process):
    result = zoft_process("methods", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["methods"][0]["name"] == "mezo"
    assert result.stderr == ""


def test_help_loads_no_torch():
    code = (
        "import sys, zoft.cli.app; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_explains_what_a_user_can_fix_and_nothing_else(tmp_path):
    assert explain(ModelError("no such model")) == "no such model"
    assert "--batch-size" in explain(MemoryError())
    with pytest.raises(OSError) as caught:
        (tmp_path / "absent").read_text()
    assert str(tmp_path / "absent") in explain(caught.value)
    assert explain(BrokenPipeError(32, "Broken pipe")) is None
    assert explain(KeyError("bug")) is None
