"""A run keeps the date that its chat template wrote into conversations."""

import datetime
import json
import shutil
from pathlib import Path

import pytest

from tests.deploy.conftest import same, stopped_at, with_
from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune
from zoft.errors import RunError
from zoft.events import Noted
from zoft.tasks import chat

DATED = (
    "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def dated(model_folder: Path, tmp_path: Path) -> FinetuneConfig:
    """A run of four steps on conversations with a date, in a model folder whose template writes it."""
    (model_folder / "chat_template.jinja").write_text(DATED)
    rows = tmp_path / "rows"
    rows.mkdir()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It was great"}]
    for split in ("train", "dev", "test"):
        (rows / f"{split}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    settings = {"method": "mezo", "steps": 4, "batch_size": 1, "lr": 1e-3, "eval_every": 2}
    return FinetuneConfig(model=str(model_folder), data=rows, out=tmp_path / "run", **settings)


@pytest.fixture
def today(monkeypatch):
    """``today(2026, 7, 26)``: what day it is from now on."""

    def set_to(*day: int) -> datetime.date:
        class Date(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return datetime.date(*day)

        monkeypatch.setattr(chat.datetime, "date", Date)
        return datetime.date(*day)

    return set_to


def test_a_run_goes_on_the_next_day_with_its_own_date(dated, today, tmp_path):
    day = today(2026, 7, 26)
    events = []
    finetune(with_(dated, out=tmp_path / "whole"), on_event=events.append)
    assert [str(day) in e.message for e in events if isinstance(e, Noted)] == [True]
    stopped_at(dated, 2)
    assert json.loads((dated.out / "config.json").read_text())["date"] == "2026-07-26"
    shutil.copytree(dated.out, tmp_path / "other")
    today(2026, 7, 28)
    result = finetune(dated, resume=True)
    assert same(dated.out, tmp_path / "whole")
    assert "| date in conversations | 2026-07-26 |" in (dated.out / "model" / "README.md").read_text()
    with pytest.raises(RunError, match="date is '2026-07-26' there, '2026-07-28' here"):
        finetune(with_(dated, out=tmp_path / "other", date="2026-07-28"), resume=True)
    evaluation = EvalConfig(model=str(dated.out / "model"), data=dated.data)
    assert evaluate_model(evaluation.model_copy(update={"date": day})).eval_loss == result.test_loss
    assert evaluate_model(evaluation).eval_loss != result.test_loss


def test_a_run_without_a_date_in_its_rows_records_none(dated, toys):
    result = finetune(with_(dated, data=toys, steps=1, eval_every=1))
    assert json.loads((result.out / "config.json").read_text())["date"] is None
    assert "date in conversations" not in (result.out / "model" / "README.md").read_text()
