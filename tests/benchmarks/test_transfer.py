"""The transfer benchmark: which runs follow from those that are done, what the table says, two processes, a kill."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the installed package comes without its benchmarks")

from benchmarks.transfer.folder import Folder
from benchmarks.transfer.plan import Cell, Method, Outcome, cells_of, pairs, rate
from benchmarks.transfer.report import entries, forwards_to, mean_curve, table
from zoft.errors import RunError


def outcome(rung: int, loss: float, *, task: str = "rte", method: str = "mezo", seed: int = 1, middle: float = 0.9):
    curve = ((0, 1.0), (50, middle), (100, loss))
    return Outcome(Cell(task, method, rung, seed), "x", curve, 0.5, "accuracy", 1.0, 10)


def done(*outcomes: Outcome) -> dict[Cell, Outcome]:
    return {one.cell: one for one in outcomes}


def rungs(*outcomes: Outcome, seeds=(1,)) -> list[int]:
    return sorted({cell.rung for cell in cells_of("rte", "mezo", seeds, done(*outcomes))})


def test_a_grid_grows_until_its_best_is_inside():
    assert rungs() == [-1, 0, 1]
    assert rungs(outcome(-1, 0.8), outcome(0, 0.7)) == [-1, 0, 1]
    assert rungs(outcome(-1, 0.8), outcome(0, 0.6), outcome(1, 0.7)) == [-1, 0, 1]
    rising = [outcome(-1, 0.8), outcome(0, 0.7), outcome(1, 0.6)]
    assert rungs(*rising) == [-1, 0, 1, 2]
    assert rungs(*rising, outcome(2, math.inf)) == [-1, 0, 1, 2]
    assert rungs(outcome(-1, 0.8), outcome(0, 0.9), outcome(1, math.inf)) == [-2, -1, 0, 1]


def test_rates_that_do_not_move_the_loss_are_followed_by_larger_ones_only():
    assert rungs(outcome(-1, 0.999), outcome(0, 0.9995), outcome(1, 1.001)) == [-1, 0, 1, 2]
    assert rungs(outcome(-1, 0.999), outcome(0, 1.1), outcome(1, 1.5)) == [-1, 0, 1]


def test_a_grid_grows_by_the_mean_over_seeds():
    first = [outcome(-1, 0.8), outcome(0, 0.7), outcome(1, 0.6)]
    assert rungs(*first, seeds=(1, 2)) == [-1, 0, 1]  # the second seed is not there yet
    second = [outcome(-1, 0.8, seed=2), outcome(0, 0.7, seed=2), outcome(1, 0.85, seed=2)]
    assert rungs(*first, *second, seeds=(1, 2)) == [-1, 0, 1]


def test_no_method_runs_on_a_task_that_it_was_learned_on():
    methods = [Method("mezo"), Method("tuner", ("copa", "sst2"))]
    assert [(task, method.name) for task, method in pairs(methods, ["sst2", "rte"])] == [
        ("sst2", "mezo"),
        ("rte", "mezo"),
        ("rte", "tuner"),
    ]


def test_an_outcome_survives_its_file(tmp_path: Path):
    folder = Folder(tmp_path)
    folder.open({"steps": 50})
    kept = outcome(1, math.inf)
    folder.keep(kept)
    assert folder.done() == {kept.cell: kept}
    with pytest.raises(RunError, match="steps is 50 there, 60 here"):
        folder.open({"steps": 60})


def test_forwards_to_a_loss_are_interpolated():
    assert forwards_to([(0, 1.0), (50, 0.5)], 0.9) == pytest.approx(10)
    assert forwards_to([(0, 1.0), (50, 0.5)], 0.4) == math.inf
    assert forwards_to([(0, 1.0), (50, 0.4), (100, 0.8)], 0.4) == 50
    assert mean_curve([[(0, 1.0), (50, 0.5)], [(0, 1.0)]]) == [(0, 1.0), (50, math.inf)]


def test_the_table_counts_forwards_wins_and_what_is_missing():
    mezo = [outcome(-1, 0.9), outcome(0, 0.8), outcome(1, 0.85)]
    tuner = [outcome(k, loss, method="tuner@copa", middle=0.6) for k, loss in ((-1, 0.7), (0, 0.5), (1, 0.6))]
    methods, tasks = [Method("mezo"), Method("tuner", ("copa",)), Method("energy", ("copa",))], ["rte", "copa"]
    found = entries(methods, tasks, (1,), done(*mezo, *tuner))
    ours = next(entry for entry in found if entry.method == "tuner@copa")
    assert (ours.lr, ours.loss, ours.at_edge) == (rate(0), 0.5, False)
    assert ours.ratio == pytest.approx(0.25)  # from 1.0 to 0.6 in 50 forwards: at MeZO's 0.8 after 25 of 100
    text = table(methods, tasks, found)
    assert "| rte | 1.000 | 0.800 (1e-05) | 0.500 (1e-05; 0.25) | not measured |" in text
    assert "| copa | not measured | not measured | learned on | learned on |" in text
    assert "| against MeZO | |  | 1 won, 0 not |  |" in text


@pytest.mark.slow
def test_a_killed_comparison_goes_on(shared: Path, stories260k: Path, tmp_path: Path):
    """Killed in the middle of the runs and started again: finished runs stay, the others are as in an unbroken one."""

    def command(work: Path) -> list[str]:
        given = ["--model", stories260k, "--data", shared / "data", "--work", work, "--task", "sst2", "--device", "cpu"]
        sizes = ["--steps", 4, "--meta-steps", 4, "--dev-size", 8, "--train-size", 32, "--batch-size", 4]
        return [sys.executable, "-m", "benchmarks.transfer", *map(str, given + sizes)]

    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), cwd=root, env=environment, check=True, capture_output=True)
    cells = tmp_path / "killed" / "cells"
    process = subprocess.Popen(command(tmp_path / "killed"), cwd=root, env=environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        if b"sst2.mezo" in line:
            break
    process.kill()
    process.communicate()
    before = {file: file.stat().st_mtime_ns for file in cells.glob("*.json")}
    assert 1 <= len(before) < len(list((tmp_path / "whole" / "cells").glob("*.json")))
    ended = subprocess.run(command(tmp_path / "killed"), cwd=root, env=environment, check=True, capture_output=True)
    assert "| sst2 |" in ended.stdout.decode()
    assert {file: file.stat().st_mtime_ns for file in before} == before

    def losses(work: Path) -> dict[Cell, tuple]:
        return {cell: one.curve for cell, one in Folder(work).done().items()}

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
