"""Comparisons on a random model: exact budgets, going on after a stop, more of everything, two processes at once."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zoft import registry
from zoft.compare import CellDone, CompareConfig, CompareEvent, compare
from zoft.compare.cells import all_cells
from zoft.compare.comparison import Comparison
from zoft.compare.folder import CompareFolder
from zoft.compare.meter import Meter
from zoft.compare.summary import rows_of
from zoft.deploy import StepDone
from zoft.errors import DataError, Interrupted, RunError
from zoft.model.fingerprint import base_hash
from zoft.model.load import Loaded, load
from zoft.registry import Recommended, TrainingSpec

from ..hub import StandIn
from ..registry.conftest import working_card


def results(out: Path) -> dict[str, Any]:
    """What came of every run, but for time and memory."""
    told = {"seconds", "peak_memory_bytes", "mean_memory_bytes"}
    return {
        cell.name: one.model_dump(exclude=told | {"curve"}) | {"curve": [(p.forwards, p.loss) for p in one.curve]}
        for cell, one in CompareFolder(out).done().items()
    }


def test_a_comparison_spends_its_budget_and_reports_on_it(described: dict[str, Any]):
    four = {"method": "mezo", "label": "mezo-q2", "settings": {"probes": 2}}
    config = CompareConfig.model_validate(
        described | {"methods": ["mezo", four, "adam", "zero-shot", {"method": "icl", "demonstrations": 2}]}
    )
    events: list[CompareEvent] = []
    result = compare(config, on_event=events.append)
    rows = {row["method"]: row for row in result.rows}
    assert {name: (row["steps"], row["forwards"]) for name, row in rows.items()} == {
        "mezo": (3, 6), "mezo-q2": (1, 4), "adam": (2, 6), "zero-shot": (0, 0), "icl": (0, 0),
    }  # fmt: skip
    assert max(event.forwards for event in events if isinstance(event, StepDone)) == config.budget
    assert all(rows[name]["edge"] for name in ("mezo", "mezo-q2", "adam"))  # one rate, which may not be extended
    assert [point["forwards"] for point in rows["adam"]["curve"]] == [0, 3, 6]
    assert rows["zero-shot"]["dev_loss"] == pytest.approx(rows["mezo"]["curve"][0]["loss"], rel=1e-6)
    assert rows["icl"]["dev_loss"] != rows["zero-shot"]["dev_loss"]
    assert (result.done, result.total) == (5, 5) and set(result.wins["loss"]) == {"mezo", "mezo-q2"}
    for row in rows.values():
        assert row["peak_memory_bytes"] >= row["mean_memory_bytes"] > 10_000_000
    runs = config.out / "runs"
    assert sorted(file.name for file in runs.iterdir()) == [
        f"tiny.rows.{name}.lr0.001.seed0" for name in ("adam", "mezo-q2", "mezo")
    ]
    assert not list(runs.glob("*/model")) and not list(runs.glob("*/snapshots/*"))


def test_the_report_says_the_same_in_every_form(described: dict[str, Any]):
    config = CompareConfig.model_validate(described | {"methods": ["mezo"], "seeds": [0, 1]})
    result = compare(config)
    (row,) = result.rows
    stored = json.loads((config.out / "compare.json").read_text())
    assert stored["rows"] == [row] and len(stored["runs"]) == 2 and stored["config"]["budget"] == 6
    with (config.out / "rows.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["loss"]) == row["loss"] and float(line["loss_spread"]) == row["loss_spread"]
    with (config.out / "runs.csv").open() as file:
        losses = [float(run["test_loss"]) for run in csv.DictReader(file)]
    assert sum(losses) / 2 == pytest.approx(row["loss"])
    assert f"{row['loss']:.3f} ± {row['loss_spread']:.3f}" in result.table.read_text()
    page = result.page.read_text()
    assert f"{row['loss']:.3f} ± {row['loss_spread']:.3f}" in page and "0.001 edge" in page
    assert page.count('src="data:image/svg+xml;base64,') == 3 and "http" not in page.replace("http-equiv", "")


def test_a_device_map_is_for_every_run_and_for_the_scores_of_the_base(described: dict[str, Any], monkeypatch):
    described |= {"methods": ["mezo", "zero-shot"]}
    compare(CompareConfig.model_validate(described))
    plain, maps = results(Path(described["out"])), []

    def noted(*args: Any, **options: Any) -> Loaded:
        maps.append(options.get("device_map"))
        return load(*args, **options)

    for job in ("zoft.deploy.setup", "zoft.deploy.evaluate"):
        monkeypatch.setattr(f"{job}.load", noted)
    described["settings"] |= {"device_map": "disk"}
    compare(CompareConfig.model_validate(described | {"out": described["out"] + "-on-disk"}))
    assert results(Path(described["out"] + "-on-disk")) == plain
    assert set(maps) == {"disk"} and len(maps) >= 3


def test_a_stopped_comparison_goes_on_and_can_be_extended(config: CompareConfig, tmp_path: Path):
    whole = config.model_copy(update={"out": tmp_path / "whole", "seeds": (0, 1)})
    compare(whole)
    steps: list[CompareEvent] = []
    with pytest.raises(Interrupted, match="stopped with 0 of 2 runs done; the same command goes on"):
        compare(config, on_event=steps.append, cancelled=lambda: any(isinstance(e, StepDone) for e in steps))
    assert not (config.out / "compare.html").exists()
    compare(config)
    before = {file: file.stat().st_mtime_ns for file in (config.out / "cells").iterdir()}
    assert len(before) == 2
    events: list[CompareEvent] = []
    result = compare(config.model_copy(update={"seeds": (0, 1)}), on_event=events.append)  # extended by a seed
    assert [event.outcome.cell.seed for event in events if isinstance(event, CellDone)] == [1, 1]
    assert {file: file.stat().st_mtime_ns for file in before} == before and result.done == 4
    assert results(config.out) == results(whole.out)
    with pytest.raises(RunError, match="budget is 6 there, 9 here"):
        compare(config.model_copy(update={"budget": 9}))


def test_a_report_runs_nothing(config: CompareConfig):
    result = compare(config, report_only=True)
    assert (result.done, result.total, result.rows) == (0, 2, ()) and not (config.out / "runs").exists()


def test_a_method_that_cannot_be_run_does_not_stop_the_others(described: dict[str, Any]):
    one = {"method": "icl", "demonstrations": 5000}
    config = CompareConfig.model_validate(described | {"methods": [one, "mezo"]})
    with pytest.raises(RunError, match=r"1 of the runs failed.*5000 demonstrations from 16 training rows"):
        compare(config)
    assert list(results(config.out)) == ["tiny.rows.mezo.lr0.001.seed0"]
    assert "mezo" in (config.out / "compare.md").read_text()


def test_a_run_that_diverges_is_a_result(described: dict[str, Any]):
    config = CompareConfig.model_validate(
        described
        | {
            "methods": [{"method": "mezo", "lr": [1e300]}],
            "budget": 60,
            "settings": {"train_size": 16, "dev_size": 4, "test_size": 4, "eval_every": 30},
        }
    )
    result = compare(config)
    (row,) = result.rows
    assert row["loss"] is None and "diverged" in result.table.read_text()
    (outcome,) = results(config.out).values()
    assert outcome["status"] == "diverged" and 0 < outcome["steps"] < 30


def test_wrong_paths_are_said_before_anything_is_loaded(config: CompareConfig, tmp_path: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        compare(config.model_copy(update={"data": tmp_path / "nowhere.jsonl"}))
    assert not config.out.exists()


@pytest.mark.parametrize("how", ["jobs", "two commands"])
def test_processes_share_the_runs(described: dict[str, Any], tmp_path: Path, how: str):
    """Every run is made once, with the result that one process alone gets."""
    config = CompareConfig.model_validate(described | {"seeds": [0, 1]})
    alone = config.model_copy(update={"out": tmp_path / "alone"})
    compare(alone)
    events: list[CompareEvent] = []
    if how == "jobs":
        compare(config, jobs=2, on_event=events.append)
        told = [event.outcome.cell.name for event in events if isinstance(event, CellDone)]
    else:
        file = tmp_path / "c.json"
        file.write_text(config.model_dump_json())
        command = [sys.executable, "-c", _PROCESS, str(file)]
        both = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            for _ in range(2)
        ]
        told = [line for process in both for line in process.communicate(timeout=300)[0].splitlines()]
        assert [process.returncode for process in both] == [0, 0]
    assert sorted(told) == sorted(results(alone.out))
    assert results(config.out) == results(alone.out)


_PROCESS = """
import sys
from pathlib import Path
import torch
from zoft.compare import CellDone, CompareConfig, compare

torch.set_num_threads(1)
config = CompareConfig.model_validate_json(Path(sys.argv[1]).read_text())
compare(config, on_event=lambda e: print(e.outcome.cell.name) if isinstance(e, CellDone) else None)
"""


def test_the_meter_sees_what_is_held(tmp_path: Path):
    import torch

    with Meter(torch.device("cpu")) as first:
        held = torch.ones(2**25)  # 128 MB
        held.sum()
        del held
    with Meter(torch.device("cpu")) as second:
        pass
    assert first.peak - second.peak > 100e6  # the peak is that of each run, not of the process
    assert second.mean is not None and second.mean <= second.peak


def test_a_tuner_s_row_tells_what_it_was_learned_with(described: dict[str, Any], model_folder: Path, tmp_path: Path):
    """An untrained tuner is MeZO to the last bit; its grid is around the rate that its card recommends."""
    loaded = load(model_folder, device="cpu")
    training = TrainingSpec(tasks=("copa",), steps=100, forwards=640)
    card = working_card(
        loaded.model, base_hash(loaded.path), training=training, recommended=Recommended(lr=3e-3), evidence=()
    )
    card.save(tmp_path / "a.tuner.safetensors")
    tuner = {"method": "zoft", "tuner": str(tmp_path / "a.tuner.safetensors")}
    mezo = {"method": "mezo", "lr": [1e-3, 3e-3, 9e-3]}
    config = CompareConfig.model_validate(described | {"methods": [mezo, tuner], "lr": None})
    first, second = compare(config).rows
    assert [one["lr"] for one in second["rates"]] == [1e-3, 3e-3, 9e-3] == [one["lr"] for one in first["rates"]]
    assert second["rates"] == first["rates"] and second["loss"] == first["loss"]
    assert (first["meta_forwards"], second["meta_forwards"]) == (None, 640)
    assert "| 640 |" in (config.out / "compare.md").read_text()
    other = working_card(loaded.model, base_hash(loaded.path), training=TrainingSpec(steps=1), evidence=())
    other.save(tmp_path / "a.tuner.safetensors")  # another card under the same name
    with pytest.raises(RunError, match="method zoft is"):
        compare(config, report_only=True)


def test_a_card_on_the_hub_is_asked_for_once(described: dict[str, Any], model_folder: Path, hub: StandIn, monkeypatch):
    """Plans and rows are made after every run; the card that a method names is resolved when the comparison opens."""
    loaded = load(model_folder, device="cpu")
    card = working_card(loaded.model, base_hash(loaded.path), recommended=Recommended(lr=3e-3), evidence=())
    hub.put("org/tuner", {"tuner.safetensors": card.content})
    methods = [{"method": "zoft", "tuner": "org/tuner"}, "mezo"]
    config = CompareConfig.model_validate(described | {"methods": methods, "lr": None, "seeds": [0, 1]})
    comparison = Comparison.open(config)
    asked = len(hub.requests)
    for _ in range(3):
        assert {cell.lr for cell in all_cells(comparison, {}) if cell.method == "zoft"} == {1e-3, 3e-3, 9e-3}
        assert rows_of(comparison, {}) == []
    assert asked and len(hub.requests) == asked
    opened, real = [], registry.open_card
    monkeypatch.setattr(registry, "open_card", lambda source: opened.append(source) or real(source))
    assert compare(config, report_only=True).total == 10
    assert opened == ["org/tuner"]
