"""The commands on a tiny model and sixty rows, through the command line alone."""

import json
import typing
from hashlib import sha256
from pathlib import Path

import pytest
import typer
from pydantic_core import PydanticUndefined
from typer.main import get_command

from tests.registry.conftest import working_card
from zoft.cli.app import app
from zoft.deploy import EvalConfig, FinetuneConfig
from zoft.model.fingerprint import base_hash
from zoft.model.load import load
from zoft.optim import METHODS
from zoft.registry import Recommended
from zoft.tasks import TASKS

KEYS = {
    "method",
    "model",
    "task",
    "steps",
    "forwards",
    "lr",
    "eps",
    "seed",
    "train_loss",
    "eval_loss_start",
    "eval_loss",
}
KEYS |= {"metric", "metric_name", "test_loss", "test_metric", "seconds", "peak_memory_bytes", "out", "journal"}
TIMES = {"seconds", "peak_memory_bytes"}
NOT_SETTINGS = {"resume", "force", "salvage", "config_file", "settings", "as_json", "help"}


@pytest.fixture
def run_arguments(model_folder, rows, tmp_path):
    """``zoft finetune`` for a few steps."""
    settings = ["--steps", 4, "--batch-size", 4, "--lr", 1e-3]
    return ["finetune", model_folder, "--data", rows, *settings, "--out", tmp_path / "run", "--json"]


def test_a_masked_model_in_few_shots(zoft, masked_folder, shared, tmp_path):
    settings = ["--task", "sst2", "--data", shared / "data", "--set", "test_size=20", "--batch-size", 4]
    settings += ["--shots", 4, "--lr", 1e-4, "--json"]
    done = zoft("finetune", masked_folder(), *settings, "--steps", 2, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["shots"] == 4
    options = ["--method", "mezo", "--method", "zero-shot", "--budget", 4, "--set", "eval_every=1"]
    done = zoft("compare", tmp_path / "roberta", *settings, *options, "--extensions", 0, "--out", tmp_path / "all")
    assert done.exit_code == 0, done.output
    assert [row["method"] for row in json.loads(done.stdout)["rows"]] == ["mezo", "zero-shot"]


def test_a_masked_model_does_not_generate(zoft, masked_folder, shared):
    done = zoft("eval", masked_folder(), "--task", "squad", "--data", shared / "data")
    assert done.exit_code == 1 and "squad (generation) has no cloze prompt for a masked language model" in done.stderr


def weights(folder: Path) -> str:
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_exact_head_alone(zoft, run_arguments):
    done = zoft(*run_arguments, "--exact", "head", "--body", "frozen")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["exact"], result["body"], result["exact_lr"], result["forwards"]) == ("head", "frozen", 2e-3, 4)
    done = zoft(*run_arguments, "--exact", "head", "--objective", "accuracy", "--force")
    assert done.exit_code == 1 and "objective accuracy has no gradient by the logits" in done.stderr


def test_finetune_eval_and_replay_agree(zoft, run_arguments, model_folder, rows, tmp_path):
    done = zoft(*run_arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result) >= KEYS
    assert (result["method"], result["steps"], result["forwards"]) == ("mezo", 4, 8)
    assert (result["lr"], result["lr_from"], result["eps"], result["eps_from"]) == (1e-3, "flag", 1e-3, "method")
    assert result["out"] == str(tmp_path / "run")

    scored = zoft("eval", tmp_path / "run" / "model", "--data", rows, "--split", "dev", "--json")
    assert scored.exit_code == 0, scored.output
    again = json.loads(scored.stdout)
    assert (again["eval_loss"], again["metric"]) == (result["eval_loss"], result["metric"])

    rows.unlink()
    replayed = zoft("replay", model_folder, tmp_path / "run", "--out", tmp_path / "copy", "--json")
    assert replayed.exit_code == 0, replayed.output
    assert json.loads(replayed.stdout)["verified"] is True
    assert weights(tmp_path / "copy") == weights(tmp_path / "run" / "model")
    again = ("replay", model_folder, tmp_path / "run", "--out")
    on_disk = zoft(*again, tmp_path / "on-disk", "--device-map", "disk")
    assert on_disk.exit_code == 0, on_disk.output
    assert weights(tmp_path / "on-disk") == weights(tmp_path / "copy")
    for said, message in (
        (("disk", "--device", "cpu"), "device cpu and a device_map"),
        (("x=disk",), "no module called 'x'"),
    ):
        failed = zoft(*again, tmp_path / "wrong", "--device-map", *said)
        assert failed.exit_code == 1 and message in failed.stderr and not (tmp_path / "wrong").exists()


def test_a_tuner_drives_a_run_and_is_reported(zoft, run_arguments, model_folder, tmp_path):
    loaded = load(model_folder, device="cpu")
    card = working_card(loaded.model, base_hash(loaded.path), recommended=Recommended(lr=2e-3, eps=2e-3))
    card.save(tmp_path / "a.tuner.safetensors")
    arguments = [a for a in run_arguments if a not in ("--lr", 1e-3)]
    done = zoft(*arguments, "--tuner", tmp_path / "a.tuner.safetensors")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["method"], result["lr"], result["lr_from"], result["eps"]) == ("zoft", 2e-3, "card", 2e-3)
    assert result["tuner"]["digest"] == card.digest and "eps_from" in result
    assert f"tuner {card.digest[:16]}: same base: the card was made for these weights" in done.stderr
    assert zoft("registry", "add", tmp_path / "a.tuner.safetensors").exit_code == 0
    found = json.loads(zoft(*arguments, "--force").stdout)  # neither --tuner nor --method
    assert (found["tuner"]["source"], found["train_loss"]) == ("auto", result["train_loss"])
    again = zoft("finetune", "--config", tmp_path / "run" / "config.json", "--out", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["tuner"]["source"] == card.digest


def test_going_on_needs_no_setting_named_again(zoft, run_arguments, tmp_path):
    first = zoft(*run_arguments)
    journal = tmp_path / "run" / "journal"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3]))  # a header and two records
    second = zoft("finetune", "--out", tmp_path / "run", "--resume", "--json")
    assert second.exit_code == 0, second.output
    timeless = [{k: v for k, v in json.loads(done.stdout).items() if k not in TIMES} for done in (first, second)]
    assert timeless[0] == timeless[1]


def test_a_damaged_journal_and_config_are_salvaged(zoft, run_arguments, tmp_path):
    """The settings are in the journal's header, and so is the proof of what precedes the damage."""
    first, run = zoft(*run_arguments), tmp_path / "run"
    lines = (run / "journal").read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"losses", b"lossez").replace(b"kept", b"kepp")
    (run / "journal").write_bytes(b"".join(lines))
    (run / "config.json").write_text("{")
    refused = zoft("finetune", "--out", run, "--resume")
    assert refused.exit_code == 1 and "go on from step" in refused.stderr and "--salvage" in refused.stderr
    done = zoft("finetune", "--out", run, "--resume", "--salvage", "--json")
    assert done.exit_code == 0, done.output
    timeless = [{k: v for k, v in json.loads(one.stdout).items() if k not in TIMES} for one in (first, done)]
    assert timeless[0] == timeless[1] and (run / "journal.damaged-1").is_file()
    assert zoft("finetune", "--out", run, "--salvage").exit_code == 2


def test_a_finished_run_resumes_to_its_result(zoft, run_arguments):
    first, second = zoft(*run_arguments), zoft(*run_arguments, "--resume")
    assert second.exit_code == 0
    assert json.loads(second.stdout) == json.loads(first.stdout)


def test_a_run_in_the_way_is_an_error_that_names_the_ways_out(zoft, run_arguments):
    assert zoft(*run_arguments).exit_code == 0
    refused = zoft(*run_arguments)
    assert refused.exit_code == 1
    assert "--resume" in refused.stderr and "--force" in refused.stderr
    assert zoft(*run_arguments, "--force").exit_code == 0


def test_people_get_a_table_and_the_path(zoft, run_arguments, tmp_path):
    done = zoft(*run_arguments[:-1])
    assert done.stdout.splitlines()[0].split() == ["model", str(tmp_path / "run" / "model")]
    assert "dev accuracy" in done.stderr and "before" in done.stderr


def test_a_config_file_alone_is_enough(zoft, model_folder, rows, tmp_path):
    file = tmp_path / "eval.yaml"
    file.write_text(f"model: {model_folder}\ndata: {rows}\nsplit: dev\n")
    scored = zoft("eval", "--config", file, "--set", "dev_size=3", "--json")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["examples"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst3"], "sst2"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--task", "sst2", "--method", "mezzo"], "did you mean 'mezo'"),
        (["--task", "sst2", "--set", "lrr=3"], "did you mean lr"),
        (["--task", "sst2", "--steps", "0"], "--steps: input should be greater than or equal to 1, found 0"),
        ([], "neither task nor data"),
        (["--task", "sst2", "--tuner", "auto", "--method", "mezo"], "method mezo takes no tuner: leave out one"),
        (["--task", "sst2", "--tuner", "absent.safetensors"], "absent.safetensors is neither a local file, nor"),
    ],
)
def test_mistakes_are_one_readable_message(zoft, model_folder, tmp_path, arguments, message):
    result = zoft("finetune", model_folder, "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert "zoft: error: " in result.stderr and "Traceback" not in result.stderr


def test_fingerprint(zoft, model_folder):
    result = zoft("fingerprint", model_folder, "--blocks", "--json")
    found = json.loads(result.stdout)
    assert len(found["base_hash"]) == len(found["architecture_hash"]) == 64
    assert found["parameters"] == sum(block["size"] for block in found["blocks"])
    for block in found["blocks"]:
        assert block["name"] in result.stderr


def test_the_lists_name_everything_with_its_source(zoft):
    tasks = json.loads(zoft("tasks", "--json").stdout)["tasks"]
    assert [task["name"] for task in tasks] == list(TASKS)
    methods = json.loads(zoft("methods", "--json").stdout)["methods"]
    assert [method["name"] for method in methods] == list(METHODS)
    assert methods[0]["source"] == "arXiv 2305.17333" and methods[0]["eps"] == 1e-3
    assert [m["source"] for m in methods if m["name"] == "zoft"] == ["arXiv 2510.00419"]


@pytest.mark.parametrize(("command", "config"), [("finetune", FinetuneConfig), ("eval", EvalConfig)])
def test_flags_are_settings_and_show_the_true_defaults(command, config):
    """A flag has the name, the choices and the default of its field."""
    parameters = [p for p in get_command(app).commands[command].params if p.name not in NOT_SETTINGS]
    assert parameters
    for parameter in parameters:
        field = config.model_fields[parameter.name]
        shown = getattr(parameter, "help", "")
        off = field.default is False  # a flag without a value: it is off unless it is given
        if parameter.name != "out" and field.default is not None and field.default is not PydanticUndefined and not off:
            assert f"[default: {field.default:{'g' if isinstance(field.default, float) else ''}}]" in shown
        if typing.get_origin(field.annotation) is typing.Literal:
            choices = set(typing.get_args(field.annotation)) - {"custom"}  # a callable, which no shell can give
            assert all(choice in shown for choice in choices), parameter.name


def test_every_command_has_examples_that_name_it():
    commands = dict(get_command(app).commands)
    commands |= {f"registry {name}": command for name, command in commands.pop("registry").commands.items()}
    for name, command in commands.items():
        assert f"zoft {name}" in (command.epilog or ""), name
        assert isinstance(command, typer.core.TyperCommand)
