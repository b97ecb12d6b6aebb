"""Descriptions of comparisons: short forms, and error messages for wrong ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from zoft.cli.settings import resolve
from zoft.compare import CompareConfig, MethodSpec
from zoft.compare.grid import first_rates
from zoft.errors import ConfigError

GOOD: dict[str, Any] = {"models": ["org/base"], "tasks": ["sst2"], "methods": ["mezo"], "budget": 100}


def read(tmp_path: Path, **changes: Any) -> CompareConfig:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(GOOD | changes))
    return resolve(CompareConfig, {}, None, file)


def test_short_forms_are_filled_in(tmp_path: Path):
    config = read(tmp_path, models=["org/base", {"model": "x/small.gguf"}], methods=["mezo", {"method": "adam"}])
    assert [spec.name for spec in config.models] == ["base", "small"]
    assert [(spec.method, spec.label) for spec in config.methods] == [("mezo", "mezo"), ("adam", "adam")]


def test_the_head_is_a_suffix_of_a_method(tmp_path: Path):
    """It takes no forward passes; with a frozen body a step takes one."""
    alone = {"method": "head", "label": "head-alone", "settings": {"body": "frozen"}}
    tuned = {"method": "zoft+head", "tuner": "card.safetensors"}
    config = read(tmp_path, methods=["mezo", "mezo+head", alone, tuned])
    assert [config.steps(spec) for spec in config.methods] == [50, 50, 100, 50]
    runs = [config.run(config.models[0], "sst2", spec, lr=1e-6, seed=0) for spec in config.methods[:3]]
    assert [(run.exact, run.body) for run in runs] == [("none", "zo"), ("head", "zo"), ("head", "frozen")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": ["mezzo"]},
            "methods.0.method: no method 'mezzo'; did you mean 'mezo'? There are: mezo, dizo, dizo-fo",
        ),
        ({"methods": []}, "methods: tuple should have at least 1 item"),
        ({"budget": 1}, "c.yaml: budget is 1 forward passes, less than one step of mezo takes; expected 2 or more"),
        ({"methods": ["adam"], "budget": 2}, "less than one step of adam takes; expected 3 or more"),
        ({"settings": {"probes": 60}}, "less than one step of mezo takes; expected 120 or more"),
        ({"budget": "many"}, "budget: input should be a valid integer"),
        ({"budget": 2.5}, "budget: input should be a valid integer, got a number with a fractional part, found 2.5"),
        ({"tasks": ["sts2"]}, 'c.yaml: tasks: no task "sts2"'),
        ({"tasks": []}, "neither tasks nor data"),
        ({"seeds": [1, 1]}, "seeds: 1 is there 2 times, expected once"),
        ({"methods": ["mezo", "mezo"]}, "methods: mezo is there 2 times, expected once; give each its own label"),
        ({"models": ["a/base", "b/base"]}, "models: base is there 2 times, expected once; give each its own name"),
        ({"lr": [0.0]}, "lr.0: input should be greater than 0, found 0.0"),
        ({"settings": {"lr": 1}}, "settings.lr: the comparison sets it for each of its runs"),
        ({"settings": {"probse": 2}}, "settings of mezo: probse: Extra inputs are not permitted, found 2"),
        ({"methods": [{"method": "mezo", "settings": {"probes": "x"}}]}, "settings of mezo: probes: Input should be"),
        ({"methods": [{"method": "mezo", "lrs": [1]}]}, "methods.0.lrs: no such setting"),
        ({"methods": [{"method": "icl", "lr": [1e-5]}]}, "icl takes no step, so it has no lr"),
        ({"methods": [{"method": "mezo", "tuner": "c"}]}, "method mezo takes no tuner"),
        ({"methods": [{"method": "mezo", "label": "a/b"}]}, "expected a name of letters, digits"),
        ({"buget": 5}, "buget: no such setting; did you mean budget?"),
    ],
)
def test_what_cannot_be_is_said_with_its_place(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, **changes)
    assert message in str(raised.value) and (raised.value.args[0].count("\n") == 0)


def test_the_budget_is_counted_in_forwards():
    config = CompareConfig.model_validate(
        GOOD
        | {"methods": ["mezo", {"method": "mezo", "label": "q4", "settings": {"probes": 4}}, "adam"], "budget": 101}
    )
    assert [config.steps(spec) for spec in config.methods] == [50, 12, 33]


def test_published_grids_come_last():
    assert first_rates(MethodSpec(method="mezo"), None) == (1e-7, 1e-6)
    assert first_rates(MethodSpec(method="dizo"), None) == (5e-7, 1e-6)
    assert first_rates(MethodSpec(method="mezo"), (1e-5, 1e-6)) == (1e-6, 1e-5)
    assert first_rates(MethodSpec(method="mezo", lr=(3e-6,)), (1e-5,)) == (3e-6,)
    assert first_rates(MethodSpec(method="sgd"), None) == (3.33e-4, 1e-3, 3e-3)  # around the default
