"""``zoft metatrain`` on a tiny model and sixty rows, through the command line alone."""

import json
import signal
import typing
from contextlib import contextmanager

import pytest
from pydantic_core import PydanticUndefined
from safetensors.torch import load_file, save_file
from typer.main import get_command

from tests.cli.conftest import ZOFT
from tests.cli.test_app import started
from zoft.cli.app import app
from zoft.cli.progress import Display
from zoft.events import MetaStepDone
from zoft.metatrain import MetatrainConfig
from zoft.registry import Card, LocalStore

KEYS = {"model", "tasks", "steps", "forwards", "seed", "seconds", "peak_memory_bytes", "out", "tuner", "verdict"}
NOT_SETTINGS = {"push", "resume", "force", "config_file", "settings", "as_json", "help"}


@pytest.fixture
def card(tmp_path):
    return tmp_path / "a.tuner.safetensors"


@pytest.fixture
def arguments(model_folder, rows, card):
    """``zoft metatrain`` for six points in three trajectories."""
    settings = ["--steps", 6, "--reset-every", 2, "--batch-size", 4, "--teacher-lr", 1e-3, "--evidence", 0]
    return ["metatrain", model_folder, "--data", rows, *settings, "--out", card]


def with_(arguments, *changes):
    """``arguments`` with options replaced by ``changes``: an option that takes one value may be given once."""
    given = {change for change in changes if str(change).startswith("--")}
    kept, rest = [], iter(arguments)
    for one in rest:
        if one in given:
            next(rest)
        else:
            kept.append(one)
    return [*kept, *changes]


@contextmanager
def cancelled_at(step, file):
    """Inside, it is as if someone made ``file`` while point ``step`` is taken."""
    draw = Display.__call__

    def drawn(self, event):
        if isinstance(event, MetaStepDone) and event.step == step:
            file.touch()
        draw(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "__call__", drawn)
        yield


def one_message(result):
    """The message of an error that the user can mend."""
    assert result.exit_code == 1, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr.partition("zoft: error: ")[2]


def test_a_card_is_made_kept_and_drives_a_run(zoft, arguments, model_folder, rows, card, tmp_path):
    done = zoft(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result) >= KEYS
    assert (result["steps"], result["seed"], result["out"]) == (6, 0, str(card))
    assert result["tuner"] == Card.load(card).digest
    assert [entry.digest for entry in LocalStore().entries()] == [result["tuner"]]
    run = zoft(
        "finetune", model_folder, "--data", rows, "--steps", 1, "--tuner", card, "--out", tmp_path / "r", "--json"
    )
    assert json.loads(run.stdout)["tuner"]["digest"] == result["tuner"]


def test_people_get_the_card_and_a_picture_of_its_scales(zoft, arguments, card):
    done = zoft(*arguments)
    assert done.stdout.splitlines()[0].split() == ["card", str(card)]
    lines = done.stderr.splitlines()
    assert any(line.startswith("point 6/6  gain ") for line in lines)
    assert any(line.startswith("scales from ") for line in lines)
    assert any(line.startswith("self_attn.v_proj") for line in lines)


def test_the_best_trial_of_each_contender_is_shown(zoft, arguments, card):
    assert zoft(*arguments).exit_code == 0
    shared = {"seed": 1, "forwards": 40, "loss_start": 0.9, "metric": 0.75, "metric_name": "accuracy"}
    trials = [("tuner", 0.5, 1e-5, 0.61, 0.60), ("tuner", 0.5, 3e-5, 0.51, 0.52), ("mezo", 1.0, 1e-5, 0.71, None)]
    rows = [
        {"name": name, "strength": strength, "lr": lr, "loss": loss, "chosen_by": chosen_by, **shared}
        for name, strength, lr, loss, chosen_by in trials
    ]
    folder = card.with_name(f"{card.name}.run")
    (folder / "evidence.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = zoft("metatrain", "--out", card, "--resume").stderr.splitlines()[-3:]
    assert [line.split() for line in shown] == [
        ["run", "lr", "forwards", "loss", "before", "loss", "metric"],
        ["tuner^0.5", "3e-05", "40", "0.9000", "0.5100", "0.7500"],
        ["mezo", "1e-05", "40", "0.9000", "0.7100", "0.7500"],
    ]


def test_an_untrained_tuner_is_mezo(zoft, model_folder, card):
    done = zoft("metatrain", model_folder, "--steps", 0, "--out", card, "--json")
    assert done.exit_code == 0, done.output
    assert "every scale is 1" in done.stderr
    assert LocalStore().entries() == []


def test_a_cancelled_job_goes_on_to_the_same_card_with_no_setting_named_again(zoft, arguments, card, tmp_path):
    whole = tmp_path / "whole.tuner.safetensors"
    assert zoft(*with_(arguments, "--out", whole)).exit_code == 0
    folder = card.with_name(f"{card.name}.run")
    with cancelled_at(3, folder / "cancel"):
        stopped = zoft(*arguments)
    assert stopped.exit_code == 130
    assert "stopped at point 3 of 6" in stopped.stderr and "--resume" in stopped.stderr
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    gone_on = zoft("metatrain", "--out", card, "--resume", "--json")
    assert gone_on.exit_code == 0, gone_on.output
    assert "resumed after step 2" in gone_on.stderr
    assert json.loads(gone_on.stdout)["tuner"] == Card.load(whole).digest


def test_ctrl_c_stops_after_a_point_and_tells_how_to_go_on(model_folder, rows, card):
    command = [*ZOFT, "metatrain", str(model_folder), "--data", str(rows)]
    process = started([*command, "--steps", "100000", "--evidence", "0", "--out", str(card)])
    assert any(line.startswith("a tuner for") for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err


def test_a_meta_training_is_repeated_from_its_folder(zoft, arguments, card, tmp_path):
    assert zoft(*arguments).exit_code == 0
    again = tmp_path / "again.tuner.safetensors"
    repeated = zoft("metatrain", "--config", card.with_name(f"{card.name}.run") / "config.json", "--out", again)
    assert repeated.exit_code == 0, repeated.output
    assert again.read_bytes() == card.read_bytes()


def test_what_is_there_is_not_overwritten_unasked(zoft, arguments, card):
    card.write_bytes(b"something")
    assert "exists already" in one_message(zoft(*arguments))
    assert card.read_bytes() == b"something"
    assert zoft(*arguments, "--force").exit_code == 0
    message = one_message(zoft(*arguments))
    assert "holds a meta-training already (finished)" in message and "--resume" in message and "--force" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--task", "copaa"], "did you mean copa"),
        (["--task", "sst2", "--evidence-task", "sst2"], "evidence_task sst2 is one of the tasks; name one held out"),
        (["--task", "sst2", "--task", "sst2"], "task sst2 is named twice"),
        (["--granularity", "kind,layer,block"], "one or two of kind, layer, block"),
        (["--batch-size", 500], "500"),
        (["--set", "techer_lr=1"], "did you mean teacher_lr"),
    ],
)
def test_mistakes_are_one_readable_message(zoft, arguments, changes, message):
    assert message in one_message(zoft(*with_(arguments, *changes)))


def test_a_task_without_training_rows_is_named(zoft, arguments, tmp_path):
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "sst2" / "dev.jsonl").write_text('{"sentence": "good", "label": 1}\n' * 8)
    message = one_message(zoft(*with_(arguments, "--task", "sst2", "--data", tmp_path / "data")))
    assert "sst2" in message and "train" in message


def test_without_task_and_data_there_is_nothing_to_learn_from(zoft, model_folder, card):
    assert "neither task nor data" in one_message(zoft("metatrain", model_folder, "--out", card))


def test_a_place_that_cannot_be_written_is_named(zoft, arguments, tmp_path):
    (tmp_path / "file").write_text("")
    message = one_message(zoft(*with_(arguments, "--out", tmp_path / "file" / "a.tuner.safetensors")))
    assert "cannot write" in message and "--out" in message


def test_too_little_evidence_is_said_and_leaves_the_card_without(zoft, arguments, card):
    done = zoft(*with_(arguments, "--evidence", 30))
    assert done.exit_code == 0, done.output
    assert "warning: no evidence: " in done.stderr
    assert Card.load(card).metadata.evidence == ()


def test_going_on_refuses_another_configuration(zoft, arguments):
    assert zoft(*arguments).exit_code == 0
    message = one_message(zoft(*arguments, "--resume", "--seed", 5))
    assert "seed is 0 there, 5 here" in message


def test_probes_were_called_directions_and_files_still_say_so(zoft, arguments, card, tmp_path):
    assert zoft(*arguments, "--directions", 2).exit_code == 0
    folder = card.with_name(f"{card.name}.run")
    assert json.loads((folder / "config.json").read_text())["config"]["directions"] == 2
    assert Card.load(card).metadata.training.config["directions"] == 2
    assert zoft("metatrain", "--out", card, "--resume").exit_code == 0
    message = one_message(zoft("metatrain", "--out", card, "--resume", "--probes", 3))
    assert "probes is 2 there, 3 here" in message
    again = tmp_path / "again.tuner.safetensors"
    config = ["metatrain", "--config", folder / "config.json", "--out", again]
    assert zoft(*config, "--set", "directions=1", "--force").exit_code == 0
    assert Card.load(again).metadata.training.config["directions"] == 1
    assert zoft(*config, "--probes", 2, "--force").exit_code == 0
    assert again.read_bytes() == card.read_bytes()


def test_going_on_where_nothing_is_says_how_to_begin(zoft, card):
    assert "zoft metatrain MODEL --out" in one_message(zoft("metatrain", "--out", card, "--resume"))


@pytest.fixture
def stopped(zoft, arguments, card):
    """The folder of a job that was stopped at point 3, past a snapshot."""
    folder = card.with_name(f"{card.name}.run")
    with cancelled_at(3, folder / "cancel"):
        assert zoft(*arguments).exit_code == 130
    return folder


def test_a_damaged_snapshot_is_named_and_passed_over(zoft, stopped, card):
    (snapshot,) = (stopped / "snapshots").iterdir()
    snapshot.write_bytes(snapshot.read_bytes()[:-100])
    done = zoft("metatrain", "--out", card, "--resume")
    assert done.exit_code == 0 and card.is_file()
    assert f"warning: {snapshot} is damaged" in done.stderr.replace("\n", " ")


def test_a_base_that_changed_since_is_refused(zoft, stopped, card, model_folder):
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, file, {"format": "pt"})
    message = one_message(zoft("metatrain", "--out", card, "--resume"))
    assert "the base has changed since" in message


def test_flags_are_settings_and_tell_the_true_defaults():
    """A flag has the name, the choices and the default of its field."""
    parameters = [p for p in get_command(app).commands["metatrain"].params if p.name not in NOT_SETTINGS]
    assert len(parameters) > 15
    for parameter in parameters:
        field, shown = MetatrainConfig.model_fields[parameter.name], getattr(parameter, "help", "")
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        if default not in (None, "", PydanticUndefined):
            assert f"[default: {default:{'g' if isinstance(default, float) else ''}}]" in shown, parameter.name
        if typing.get_origin(field.annotation) is typing.Literal:
            assert all(choice in shown for choice in typing.get_args(field.annotation)), parameter.name
