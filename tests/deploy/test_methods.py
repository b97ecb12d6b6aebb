"""Runs of the methods with state, extra forwards or projections: resume, replay, true counts, mistakes."""

from pathlib import Path
from typing import Any

import pytest

from zoft.deploy import FinetuneConfig, StepDone, finetune, replay
from zoft.deploy.journal import Journal, Line, ProjectionLine, read_journal
from zoft.errors import ConfigError, ModelError

from .conftest import same, stopped_at, with_, without_times

# method, its options, forwards of 8 steps on 64 training rows in batches of 16
RUNS: list[tuple[str, dict[str, Any], float]] = [
    ("dizo", {"cycle": 3, "inner": 2}, 16 + 2 * 4),
    ("dizo-fo", {"cycle": 3, "inner": 2}, 16 + 2 * 6),
    ("mezo-svrg", {"refresh": 3, "full_ratio": 1}, 3 * 2 * 4 + 5 * 4),
    ("lozo-m", {"refresh": 3}, 16),
    ("hizoo", {"alpha": 1e-4}, 24),
    ("zo-adamu", {"warmup": 2}, 16),
    ("fzoo", {}, 72),
    ("scalar-adam+dizo", {"cycle": 4, "inner": 1}, 16 + 2 * 2),
]


@pytest.mark.parametrize(("method", "options", "forwards"), RUNS, ids=[run[0] for run in RUNS])
def test_a_run_resumes_replays_and_counts(
    config: FinetuneConfig, tmp_path: Path, method: str, options: dict[str, Any], forwards: float
) -> None:
    changes = {"method": method, "options": options, "steps": 8, "dtype": "bf16", "accumulate": 2, "schedule": "linear"}
    reported: list[float] = []
    unbroken = finetune(
        with_(config, out=tmp_path / "unbroken", **changes),
        on_event=lambda event: reported.append(event.forwards) if isinstance(event, StepDone) else None,
    )
    assert unbroken.forwards == reported[-1] == forwards and len(reported) == 8
    broken = with_(config, out=tmp_path / "broken", **changes)
    for stop in (2, 3, 6):
        stopped_at(broken, stop, resume=True)
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", tmp_path / "broken")
    replayed = replay(config.model, tmp_path / "broken", tmp_path / "replayed")
    assert replayed.verified and replayed.step == unbroken.kept_step


def test_killed_between_a_step_and_its_projection(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"method": "dizo", "options": {"cycle": 3, "inner": 2}, "steps": 8}
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **changes))
    append = Journal.append

    def killed(self: Journal, line: Line) -> None:
        if isinstance(line, ProjectionLine) and line.step == 5:
            raise KeyboardInterrupt
        append(self, line)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Journal, "append", killed)
        finetune(with_(config, out=tmp_path / "killed", **changes))
    left = read_journal(tmp_path / "killed" / "journal")
    assert len(left.steps) == 6 and list(left.projections) == [2]
    assert without_times(finetune(with_(config, out=tmp_path / "killed", **changes), resume=True)) == without_times(
        unbroken
    )
    assert same(tmp_path / "unbroken", tmp_path / "killed")


def test_mistakes_are_reported_before_anything_is_loaded(config: FinetuneConfig) -> None:
    with pytest.raises(ConfigError, match=r"no method 'lozzo'; did you mean 'lozo'\? There are: mezo, .*zo-ldsd"):
        finetune(with_(config, method="lozzo"))
    with pytest.raises(ValueError, match=r"method lozo has no option 'rnk'; did you mean 'rank'\?"):
        with_(config, method="lozo", options={"rnk": 1})
    with pytest.raises(ValueError, match="rank: input should be greater than or equal to 1, found 0"):
        with_(config, method="lozo", options={"rank": 0})
    with pytest.raises(ModelError, match="the model has none of these"):
        finetune(with_(config, method="dizo", options={"targets": "nowhere"}))
