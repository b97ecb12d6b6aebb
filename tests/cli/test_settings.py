from pathlib import Path

import pytest
from typer.testing import CliRunner

from zoft.cli.app import app
from zoft.cli.settings import resolve
from zoft.deploy import EvalConfig, FinetuneConfig
from zoft.errors import ConfigError

BASE = {"model": "m", "task": "sst2"}


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_flag_goes_before_set_before_file_before_default(file):
    path = file("steps: 1\nprobes: 2\nseed: 3\n")
    config = resolve(FinetuneConfig, BASE | {"steps": 10, "lr": None}, ["steps=5", "probes=6"], path)
    assert (config.steps, config.probes, config.seed, config.batch_size) == (10, 6, 3, 16)


def test_numbers_in_a_file_may_be_written_as_people_write_them(file):
    config = resolve(FinetuneConfig, {}, [], file("model: m\ntask: sst2\nlr: 1e-6\nmaster_weights: yes\nout: runs/x\n"))
    assert (config.lr, config.master_weights, config.out) == (1e-6, True, Path("runs/x"))


def test_set_takes_every_field_in_either_spelling_and_null():
    config = resolve(FinetuneConfig, BASE, ["batch-size=4", "test_size=9", "lr=null", "model=a=b"], None)
    assert (config.batch_size, config.test_size, config.lr, config.model) == (4, 9, None, "m")


def test_a_value_may_hold_an_equals_sign():
    assert resolve(EvalConfig, {"task": "sst2"}, ["model=a=b"], None).model == "a=b"


def test_all_problems_are_reported_at_once_with_their_source(file):
    path = file("stepps: 3\neps: -1\n")
    with pytest.raises(ConfigError) as caught:
        resolve(FinetuneConfig, BASE | {"batch_size": 0}, ["prob=2", "lr=fast"], path)
    message = str(caught.value)
    assert message.startswith("5 settings do not fit:\n")
    assert f"{path}: stepps: no such setting; did you mean steps or eps?" in message
    assert f"{path}: eps: input should be greater than 0, found -1" in message
    assert "--set prob: no such setting; did you mean probes?" in message
    assert "--set lr: input should be a valid number" in message and "found 'fast'" in message
    assert "--batch-size: input should be greater than or equal to 1, found 0" in message


def test_a_name_that_resembles_none_lists_them_all():
    with pytest.raises(ConfigError, match="there are model, task, data, split"):
        resolve(EvalConfig, BASE, ["xyzzy=1"], None)


def test_a_rule_about_several_settings_keeps_its_own_message():
    with pytest.raises(ConfigError, match=r"^the settings do not fit: accumulate is 32, more than batch_size 16$"):
        resolve(FinetuneConfig, BASE, ["accumulate=32"], None)


@pytest.mark.parametrize("setting", ["steps", "=3", ""])
def test_set_needs_a_key_and_a_value(setting):
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        resolve(FinetuneConfig, BASE, [setting], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "found list"), ("", "found NoneType"), ("a: [1\n", "not valid YAML"), ("1: 2\n", "name: value")],
)
def test_a_file_that_is_no_mapping_is_named(file, text, message):
    path = file(text)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(FinetuneConfig, BASE, [], path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        resolve(FinetuneConfig, BASE, [], tmp_path / "absent.yaml")


def test_options_of_a_method_are_set_one_by_one(file) -> None:
    path = file("method: lezo+mezo-adam\noptions: {keep: 0.5, beta1: 0.8}\n")
    config = resolve(FinetuneConfig, BASE, ["options.keep=0.75"], path)
    assert config.options == {"keep": 0.75, "beta1": 0.8, "beta2": 0.999, "epsilon": 1e-8}
    with pytest.raises(ConfigError, match=r"method lezo has no option 'kep'; did you mean 'keep'\? there are keep"):
        resolve(FinetuneConfig, BASE | {"method": "lezo"}, ["options.kep=1"], None)
    with pytest.raises(ConfigError, match="options need a method, and the method is None: name one of mezo, "):
        resolve(FinetuneConfig, BASE, ["options.keep=1"], None)


@pytest.mark.parametrize(
    "repeated", [["--task", "sst2", "--task", "rte"], ["--data", "a", "--data", "b"], ["--seed", "1", "--seed=2"]]
)
@pytest.mark.parametrize("command", ["finetune", "eval"])
def test_an_option_that_takes_one_value_is_refused_twice(command, repeated):
    if command == "eval" and "--seed" in repeated:
        repeated = ["--dtype", "fp32", "--dtype=bf16"]
    found = CliRunner().invoke(app, [command, "model", *repeated])
    assert found.exit_code == 2 and f"{repeated[0]} is given 2 times and takes one value" in found.stderr


def test_options_that_take_several_values_and_plain_flags_may_be_repeated():
    arguments = ["model", "--task", "sst2", "--task", "rte", "--method", "mezo", "--method", "lozo", "--json", "--json"]
    found = CliRunner().invoke(app, ["compare", *arguments, "--set", "a=1", "--set", "b=2"])
    assert found.exit_code == 1 and "settings do not fit" in found.stderr
