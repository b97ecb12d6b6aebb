"""Runs with the exact head: they learn, resume and replay bit for bit, count their forwards, and say what cannot be."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from zoft.deploy import FinetuneConfig, StepDone, finetune, replay
from zoft.deploy.journal import Journal, StepLine, read_journal
from zoft.errors import RunError

from .conftest import NAMES, TOYS, same, stopped_at, with_, without_times

HEAD: dict[str, Any] = {"exact": "head", "method": "mezo"}
FROZEN: dict[str, Any] = {"exact": "head", "body": "frozen"}


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """Prompts with completions: a language-model loss, whose head moves in all rows."""
    file = tmp_path / "stories.jsonl"
    rows = [
        {"prompt": f"{name} got a {toy}.", "completion": f" {name} was very happy with the {toy}."}
        for name in NAMES
        for toy in TOYS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_head_alone_learns_in_one_forward_a_step(config: FinetuneConfig, dtype: str) -> None:
    result = finetune(with_(config, **FROZEN, steps=60, eval_every=30, dtype=dtype))
    assert result.eval_loss_start is not None and result.eval_loss is not None
    assert result.eval_loss < 0.75 * result.eval_loss_start
    assert result.forwards == 60 and result.examples == 960
    assert (result.method, result.exact, result.body, result.exact_lr) == ("mezo", "head", "frozen", 2e-3)
    assert result.zero_slope_steps == result.skipped_steps == 0


@pytest.mark.parametrize(
    "changes",
    [
        HEAD,
        FROZEN,
        FROZEN | {"dtype": "bf16", "master_weights": True},
        HEAD | {"dtype": "bf16", "accumulate": 3, "weight_decay": 0.01, "method": "mezo-momentum"},
    ],
)
def test_interrupted_and_resumed_equals_unbroken_and_replays(
    config: FinetuneConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"schedule": "linear", "warmup": 3, **changes}
    told: list[float] = []
    unbroken = finetune(
        with_(config, out=tmp_path / "unbroken", **changes),
        on_event=lambda event: told.append(event.forwards) if isinstance(event, StepDone) else None,
    )
    assert unbroken.forwards == told[-1] == 12 * (1 if "body" in changes else 2)
    broken = with_(config, out=tmp_path / "broken", **changes)
    for stop in (2, 5, 6, 11):
        stopped_at(broken, stop, resume=True)
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", tmp_path / "broken")
    replayed = replay(config.model, tmp_path / "broken", tmp_path / "replayed")
    assert replayed.verified and replayed.step == unbroken.kept_step
    again = replay(config.model, tmp_path / "broken", tmp_path / "early", step=3)
    assert again.step == 3


@pytest.mark.parametrize("changes", [HEAD, FROZEN])
def test_a_language_model_loss_resumes_by_measuring_again_and_does_not_replay(
    config: FinetuneConfig, stories: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"data": stories, "batch_size": 8, "snapshot_every": 5, "accumulate": 2, **changes}
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **changes))
    assert unbroken.exact_lr == 1e-4 and unbroken.eval_loss < unbroken.eval_loss_start
    contents = read_journal(tmp_path / "unbroken" / "journal")
    assert contents.header.exact_rows is None and not any(record.exact for record in contents.steps)
    broken = with_(config, out=tmp_path / "broken", **changes)
    stopped_at(broken, 7, resume=True)
    for snapshot in (tmp_path / "broken" / "snapshots").iterdir():
        if snapshot.name > "step-00000005":
            snapshot.unlink()  # as after a power cut: two steps have to be taken again
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", tmp_path / "broken")
    with pytest.raises(RunError, match="gradients that are too large for a journal; a replay has no data to measure"):
        replay(config.model, tmp_path / "unbroken", tmp_path / "replayed")


@pytest.mark.slow
@pytest.mark.parametrize("body", ["zo", "frozen"])
def test_killed_at_any_moment(config: FinetuneConfig, tmp_path: Path, body: str) -> None:
    changes = HEAD | {"body": body, "steps": 400, "eval_every": 100, "snapshot_every": 40}
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **changes))
    out = tmp_path / "killed"
    file = tmp_path / "config.json"
    file.write_text(with_(config, out=out, **changes).model_dump_json())
    command = [sys.executable, "-m", "zoft", "finetune", "--config", str(file), "--resume"]
    journal = out / "journal"
    for kill in range(3):
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > before + 4000 * (kill + 1)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert without_times(finetune(with_(config, out=out, **changes), resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", out)


def test_the_journal_has_the_gradient_of_the_rows_of_the_answers(config: FinetuneConfig) -> None:
    finetune(with_(config, **HEAD))
    contents = read_journal(config.out / "journal")
    assert contents.header is not None and contents.header.format == 3
    rows = contents.header.exact_rows
    assert rows is not None and 2 <= len(rows) <= 12
    record = contents.steps[4]
    assert set(record.extra) == {"exact_lr", "exact_norm"} and record.extra["exact_lr"] == 2e-3
    assert [len(raw) for raw in record.exact.values()] == [len(rows) * 64 * 4, 64 * 4]  # head, final norm
    written = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert written[1]["exact_norm"] > 0 and written[1]["exact_lr"] == 2e-3


def test_without_it_a_journal_is_as_it_was(config: FinetuneConfig) -> None:
    finetune(config)
    header, *lines = [json.loads(line[9:]) for line in (config.out / "journal").read_text().splitlines()]
    assert header["format"] == 2 and "exact_rows" not in header
    assert all(set(line) == {"kind", "step", "lr", "eps", "losses"} for line in lines if line["kind"] == "step")


def test_a_journal_of_another_head_is_refused(config: FinetuneConfig, tmp_path: Path) -> None:
    finetune(with_(config, **FROZEN))
    contents = read_journal(config.out / "journal")
    record = contents.steps[0]
    name, raw = next(iter(record.exact.items()))
    without = {other: raw for other, raw in record.exact.items() if other != name}
    for number, exact in enumerate(({**record.exact, name: raw[:-4]}, without, {**record.exact, "other": b""})):
        journal = Journal(tmp_path / f"journal-{number}")
        for line in (contents.header, StepLine.of(replace(record, exact=exact))):
            journal.append(line)
        journal.close()
        with pytest.raises(RunError, match="do not fit the head of this model"):
            replay(config.model, journal.path, tmp_path / "replayed", step=1)


def test_the_rate_of_the_head_is_set_and_kept(config: FinetuneConfig) -> None:
    stopped_at(with_(config, **HEAD, exact_lr=5e-3), 3)
    assert FinetuneConfig.model_validate_json((config.out / "config.json").read_text()).exact_lr == 5e-3
    assert finetune(with_(config, **HEAD), resume=True).exact_lr == 5e-3
    with pytest.raises(RunError, match=r"exact_lr is 0\.005 there, 0\.001 here"):
        finetune(with_(config, **HEAD, exact_lr=1e-3), resume=True)
    with pytest.raises(RunError, match=r"exact is 'head' there, 'none' here"):
        finetune(with_(config), resume=True)


def test_head_is_a_part_of_a_method(config: FinetuneConfig, tmp_path: Path) -> None:
    named = finetune(with_(config, method="mezo+head", out=tmp_path / "named"))
    assert (named.method, named.exact) == ("mezo+head", "head")
    finetune(with_(config, **HEAD, out=tmp_path / "flag"))
    assert same(tmp_path / "named", tmp_path / "flag")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"body": "frozen"}, "body is frozen and exact is none, so nothing moves"),
        ({"exact_lr": 1.0}, "exact_lr is 1.0 and exact is none"),
        ({"exact": "head", "objective": "accuracy"}, "objective accuracy has no gradient by the logits, which"),
        ({"exact": "head", "lora": True}, "with an adapter the head is frozen"),
        ({"exact": "head", "graphs": True}, "replays forward passes that give no gradient"),
        ({"exact": "head", "body": "frozen", "method": "zoft"}, "a tuner has no scales to give"),
        ({"exact": "head", "method": "adam"}, "method adam has the gradient of every block"),
        ({"exact": "all"}, "Input should be 'none' or 'head'"),
    ],
)
def test_what_does_not_go_together(config: FinetuneConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        with_(config, **changes)
