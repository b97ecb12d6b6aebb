"""The meta-training job on a real model: reset, resume, cancel, guards, the card and its facts."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from zoft.deploy import Warned
from zoft.errors import DataError, Interrupted, ModelError, RunError
from zoft.events import MetaEvent, MetaStepDone, TrialDone
from zoft.metatrain import MetatrainConfig, metatrain
from zoft.metatrain.step import MetaPoint, MetaStepper
from zoft.model.checkpoint import file_tensors
from zoft.model.load import load
from zoft.registry import Card, LocalStore, first_scales
from zoft.tuner.networks import group_of
from zoft.weights.blocks import statistics, trainable_blocks


@pytest.fixture
def config(stories260k: Path, shared: Path, tmp_path: Path):
    """``config(**changes)``: a few points of COPA on stories260K."""

    def make(**changes: object) -> MetatrainConfig:
        settings: dict[str, object] = {
            "model": str(stories260k),
            "tasks": ("copa",),
            "data": shared / "data",
            "steps": 7,
            "reset_every": 3,
            "lr": 1e-4,
            "batch_size": 2,
            "train_size": 20,
            "dev_size": 24,
            "evidence": 0,
            "out": tmp_path / "card.tuner.safetensors",
        }
        return MetatrainConfig(**settings | changes)

    return make


def metrics(config: MetatrainConfig) -> list[dict]:
    lines = (config.out.with_name(config.out.name + ".run") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Stop:
    """Asks to stop after the point ``at``, or after the trial ``at``."""

    def __init__(self, at: int, kind: type = MetaStepDone) -> None:
        self.at, self.kind, self.reached = at, kind, False

    def listen(self, event: MetaEvent) -> None:
        if isinstance(event, self.kind):
            self.reached |= (event.step if isinstance(event, MetaStepDone) else event.done) >= self.at

    def __call__(self) -> bool:
        return self.reached


def test_a_card_comes_out_that_fits_its_base_and_drives_it(config) -> None:
    settings = config(steps=12)
    result = metatrain(settings)
    card = Card.load(settings.out)
    assert card.digest == result.tuner and LocalStore().get(result.tuner).digest == result.tuner
    assert result.bytes == settings.out.stat().st_size < 2_000_000
    assert (result.steps, result.skipped_steps) == (12, 0)
    assert result.forwards == 12 * 8 + 2 * 3  # 8 a point, 3 more at the two that are compared with sigma = 1
    blocks = trainable_blocks(load(settings.model, dtype="fp32").model)
    assert [block.name for block in card.metadata.blocks] == [block.name for block in blocks]
    # Taken before the first teacher step, not after the last:
    torch.testing.assert_close(card.tensors["base.statistics"], statistics(blocks).float())
    scales = first_scales(card)
    assert scales.std() > 0.05, "nothing was learned"
    sizes = torch.tensor([block.size for block in blocks], dtype=torch.float64)
    assert (sizes * scales**2).sum().item() == pytest.approx(sizes.sum().item(), rel=1e-6)
    assert str(settings.data) not in json.dumps(card.metadata.training.config)


def test_a_fresh_batch_is_the_one_that_comes_next(config, tmp_path: Path) -> None:
    """It costs a forward a point, leads to another tuner, and to the same one when it goes on after a stop."""
    same = metatrain(config(estimator="exact", out=tmp_path / "same.safetensors", compare_every=0))
    fresh = config(meta_batch="fresh", out=tmp_path / "fresh.safetensors", compare_every=0)
    whole = metatrain(fresh)
    assert (same.forwards, whole.forwards) == (7 * 8, 7 * 9) and same.tuner != whole.tuner
    rows, stop = metrics(fresh), Stop(5)
    teacher = metrics(config(out=tmp_path / "same.safetensors"))
    # The same tuner at first, and the teacher's path: what a batch is worth after it was taken next is its loss there.
    assert rows[0]["scales"] == teacher[0]["scales"] and rows[0]["loss"] != teacher[0]["loss"]
    again = config(meta_batch="fresh", out=tmp_path / "again.safetensors", compare_every=0)
    with pytest.raises(Interrupted):
        metatrain(again, on_event=stop.listen, cancelled=stop)
    assert metatrain(again, resume=True).tuner == whole.tuner
    with pytest.raises(DataError, match="copa: 20 training rows, expected two batches of 12 for meta_batch fresh"):
        metatrain(config(meta_batch="fresh", batch_size=12, out=tmp_path / "few.safetensors"))


def test_activations_computed_again_lead_to_the_same_tuner(config, tmp_path: Path) -> None:
    cards = []
    for again in (False, True):
        settings = config(steps=4, checkpoint_activations=again, out=tmp_path / str(again) / "c")
        metatrain(settings)
        cards.append((Card.load(settings.out).tensors, [row["loss"] for row in metrics(settings)]))
    (plain, losses), (other, again) = cards
    assert losses == again
    assert plain.keys() == other.keys() and all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_reset_is_the_base_again(config) -> None:
    """With one batch only, every trajectory begins at the same loss and falls from there as the first did."""
    settings = config(steps=6, batch_size=8, train_size=8, teacher_lr=1e-3)
    metatrain(settings)
    losses = [row["loss"] for row in metrics(settings)]
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("preset", ["zoft", "paper"])
def test_resumed_equals_uninterrupted(config, tmp_path: Path, preset: str) -> None:
    whole, parts = config(preset=preset, out=tmp_path / "a" / "c"), config(preset=preset, out=tmp_path / "b" / "c")
    expected = metatrain(whole)
    for point in (5, 7):
        stop = Stop(point)
        with pytest.raises(Interrupted, match="--resume goes on from the reset at point"):
            metatrain(parts, resume=point > 5, on_event=stop.listen, cancelled=stop)
    result = metatrain(parts, resume=True)
    assert result.tuner == expected.tuner
    assert metrics(parts) == metrics(whole)
    assert (result.forwards, result.steps) == (expected.forwards, expected.steps)


def test_a_finished_job_returns_its_result_again(config) -> None:
    settings = config(steps=3)
    result = metatrain(settings)
    settings.out.unlink()  # shows that nothing is computed anew
    assert metatrain(settings, resume=True) == result


def test_a_status_that_cannot_be_read_or_written_does_not_stop_a_job(config) -> None:
    settings = config(steps=3)
    result = metatrain(settings)
    status = settings.out.with_name(settings.out.name + ".run") / "status.json"
    whole = json.loads(status.read_text())
    for damaged in (b"", b"{", b"[1]", b"\xff", json.dumps(whole | {"result": {}}).encode(), b'{"state": "finished"}'):
        status.write_bytes(damaged)
        again = metatrain(settings, resume=True)
        assert (again.tuner, again.steps, again.forwards) == (result.tuner, result.steps, result.forwards)
        assert json.loads(status.read_text())["state"] == "finished"
    status.unlink()
    status.mkdir()
    assert metatrain(settings, resume=True).tuner == result.tuner


def test_several_tasks_take_turns(config) -> None:
    settings = config(tasks=("copa", "sst2", "boolq"), steps=6)
    metatrain(settings)
    rows = [row["task"] for row in metrics(settings)]
    assert sorted(rows[:3]) == sorted(rows[3:]) == ["boolq", "copa", "sst2"]
    assert Card.load(settings.out).metadata.training.tasks == ("copa", "sst2", "boolq")


def test_evidence_is_counted_kept_and_resumed(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five contenders at three rates, three of them longer at two; a stop between runs loses none."""
    monkeypatch.setattr("zoft.metatrain.evidence.MIN_STEPS", 2)
    changes = {"steps": 44, "reset_every": 22, "probes": 1, "eval_batch_size": 64, "compare_every": 0}
    whole, parts = config(evidence=None, **changes), config(evidence=None, out=tmp_path / "b" / "c", **changes)
    seen: list[TrialDone] = []
    expected = metatrain(whole, on_event=lambda e: seen.append(e) if isinstance(e, TrialDone) else None)
    card = Card.load(whole.out).metadata
    assert expected.evidence_forwards == sum(row.forwards for row in card.evidence) <= expected.forwards / 3
    assert {row.name for row in card.evidence} == {"tuner", "tuner^0.5", "mezo", "energy", "random"}
    assert len({row.forwards for row in card.evidence}) == 2 and len(card.evidence) == seen[-1].total == 21
    assert len(card.longest_runs) == 6 and "mezo" in {row.name for row in card.longest_runs}
    assert card.recommended_steps == card.longest_runs[0].forwards // 2
    assert card.recommended.lr in {row.lr for row in card.longest_runs}
    assert len({row.loss_start for row in card.evidence}) == 1, "every run starts from the base"
    assert card.verdict == expected.verdict and "held-out copa rows (dev rows)" in card.verdict
    assert (card.recommended.lr, card.recommended.eps) == (expected.lr, 1e-3)
    assert card.network.strength == expected.strength
    stop = Stop(4, TrialDone)
    with pytest.raises(Interrupted, match="--resume"):
        metatrain(parts, on_event=stop.listen, cancelled=stop)
    again: list[TrialDone] = []
    job = parts.out.with_name("c.run")
    for name in ("evidence.jsonl", "metrics.jsonl", "events.jsonl", "status.json"):
        (job / name).write_bytes((job / name).read_bytes()[:-9])  # torn by a power cut
    assert metatrain(parts, resume=True, on_event=lambda e: again.append(e)).tuner == expected.tuner
    assert [e for e in again if isinstance(e, TrialDone)] == seen
    for name in ("evidence.jsonl", "metrics.jsonl", "events.jsonl"):
        assert all(json.loads(line) for line in (job / name).read_text().splitlines())
    assert len((job / "evidence.jsonl").read_text().splitlines()) == 21


def test_a_warm_start_from_the_signal(config, tmp_path: Path) -> None:
    """At the first point each kind has its ratio, pooled over both tasks; a job that is resumed has it, too."""
    changes = {"tasks": ("copa", "sst2"), "steps": 4, "reset_every": 2, "warm_start": "signal", "compare_every": 0}
    settings = config(**changes)
    result = metatrain(settings)
    assert result.forwards == 4 * 8 + 5 * 16 * 2
    scales = torch.tensor(metrics(settings)[0]["scales"])
    names = [block.name for block in Card.load(settings.out).metadata.blocks]
    of_kind: dict[str, set[float]] = {}
    for name, scale in zip(names, scales.tolist(), strict=True):
        of_kind.setdefault(group_of(name, "kind"), set()).add(scale)
    assert all(len(found) == 1 for found in of_kind.values()) and scales.max() > 1.5 * scales.min()
    stop, parts = Stop(3), config(out=tmp_path / "b" / "c", **changes)
    with pytest.raises(Interrupted):
        metatrain(parts, on_event=stop.listen, cancelled=stop)
    assert metatrain(parts, resume=True).tuner == result.tuner


def test_an_untrained_tuner_is_mezo_and_stays_out_of_the_store(config) -> None:
    settings = config(steps=0, tasks=(), data=None)
    result = metatrain(settings)
    assert torch.equal(first_scales(Card.load(settings.out)), torch.ones(47, dtype=torch.float64))
    assert result.forwards == 0 and not LocalStore().entries()


@pytest.mark.parametrize("teacher", ["adam", "sgd"])
def test_a_diverging_trajectory_is_left_and_teaches_nothing(config, teacher: str) -> None:
    """The first point of each trajectory is sound, the next ones are not: back to the base each time."""
    settings = config(teacher=teacher, teacher_lr=1e18, steps=6)
    result = metatrain(settings)
    rows = metrics(settings)
    assert [row["finite"] for row in rows] == [True, False, True, True, False, True]
    assert result.skipped_steps == 2 and first_scales(Card.load(settings.out)).isfinite().all()


def test_a_base_that_gives_no_finite_loss_ends_the_job(config) -> None:
    with pytest.raises(RunError, match=r"10 points in a row were not finite, up to point 10.*lower"):
        metatrain(config(lr=1e18, learn_lr=False, steps=30))


def test_autocast_leaves_the_teachers_weights_in_float32(config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    step = MetaStepper.step

    def observed(stepper: MetaStepper, *args: Any) -> MetaPoint:
        seen.update(block.parameter.dtype for block in stepper.blocks)
        return step(stepper, *args)

    monkeypatch.setattr(MetaStepper, "step", observed)
    monkeypatch.setattr("zoft.weights.products.lacks_instructions", lambda dtype: dtype == torch.bfloat16)
    settings, told = config(dtype="bf16", steps=3), []
    metatrain(settings, on_event=told.append)
    assert seen == {torch.float32}
    assert any(isinstance(event, Warned) and "no bfloat16 instructions" in event.message for event in told)
    exact = metrics(settings)[0]["loss"]
    metatrain(config(steps=3), force=True)
    plain = metrics(settings)[0]["loss"]
    assert exact != plain and exact == pytest.approx(plain, rel=0.02)


def test_the_job_folder_tells_where_the_job_is_and_can_stop_it(config) -> None:
    settings = config(steps=30)
    job = settings.out.with_name(settings.out.name + ".run")

    def listen(event: MetaEvent) -> None:
        if isinstance(event, MetaStepDone) and event.step == 4:
            (job / "cancel").touch()

    with pytest.raises(Interrupted):
        metatrain(settings, on_event=listen)
    status = json.loads((job / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("stopped", 4, 30)
    assert [file.name for file in (job / "snapshots").iterdir()] == ["reset-00000003.safetensors"]
    assert metatrain(settings, resume=True).steps == 30, "the cancel file was for the job before"
    assert json.loads((job / "status.json").read_text())["state"] == "finished"


def test_what_cannot_go_on_says_so(config, tmp_path: Path) -> None:
    settings = config(steps=3)
    metatrain(settings)
    with pytest.raises(RunError, match=r"already .finished.; go on with --resume, start again with --force"):
        metatrain(settings)
    with pytest.raises(RunError, match="seed is 0 there, 1 here"):
        metatrain(config(steps=3, seed=1), resume=True)
    (tmp_path / "other").write_text("mine")
    with pytest.raises(RunError, match="other exists already"):
        metatrain(config(out=tmp_path / "other"))
    assert not (tmp_path / "other.run").exists()
    job = settings.out.with_name(settings.out.name + ".run")
    stored = json.loads((job / "config.json").read_text())
    (job / "config.json").write_text(json.dumps(stored | {"base_hash": "0" * 64}))
    with pytest.raises(RunError, match="the base has changed"):
        metatrain(settings, resume=True)


def test_a_snapshot_that_is_damaged_or_of_another_job_is_passed_over(config, tmp_path: Path) -> None:
    """Truncated, a bit of the optimizer's state flipped, of another job or another point: the same card in the end."""
    changes = {"steps": 5, "compare_every": 0}
    whole, stopped = config(out=tmp_path / "whole" / "c", **changes), config(out=tmp_path / "stopped" / "c", **changes)
    other = config(out=tmp_path / "other" / "c", seed=1, **changes)
    expected = metatrain(whole)
    for settings in (stopped, other):
        stop = Stop(4)
        with pytest.raises(Interrupted):
            metatrain(settings, on_event=stop.listen, cancelled=stop)
    snapshot = Path("c.run", "snapshots", "reset-00000003.safetensors")
    content, another = ((folder / snapshot).read_bytes() for folder in (stopped.out.parent, other.out.parent))
    stored = next(one for one in file_tensors(stopped.out.parent / snapshot) if "exp_avg_sq" in one.name)
    flipped = bytearray(content)
    flipped[stored.offset] ^= 1
    cases = {"short": content[:-100], "flipped": bytes(flipped), "swapped": another, "point": content}
    for name, damaged in cases.items():
        shutil.copytree(stopped.out.parent, tmp_path / name)
        place = tmp_path / name / snapshot
        place.write_bytes(damaged)
        if name == "point":
            place.rename(place.with_name("reset-00000002.safetensors"))
        events: list[MetaEvent] = []
        settings = config(out=tmp_path / name / "c", **changes)
        assert metatrain(settings, resume=True, on_event=events.append).tuner == expected.tuner, name
        messages = [event.message for event in events if isinstance(event, Warned)]
        assert any("is damaged or of another meta-training" in message for message in messages), name
        assert metrics(settings) == metrics(whole)


def test_wrong_data_and_models_leave_nothing_behind(config, tmp_path: Path) -> None:
    (tmp_path / "data" / "copa").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train.jsonl"):
        metatrain(config(data=tmp_path / "data"))
    with pytest.raises(DataError, match="a batch of 50 from 20 training rows"):
        metatrain(config(batch_size=50))
    with pytest.raises(DataError, match="too few to test the tuner on"):
        metatrain(config(steps=400, evidence=None, dev_size=4))
    with pytest.raises(RunError, match="is a folder; expected the name of a file"):
        metatrain(config(out=tmp_path / "data"), force=True)
    with pytest.raises(ModelError):
        metatrain(config(model=str(tmp_path / "nothing")))
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": (), "data": None}, "neither task nor data"),
        ({"tasks": ("copa", "copa")}, "task copa is named twice"),
        ({"granularity": "kind,kind"}, "one or two of kind, layer, block"),
        ({"evidence_task": "copa"}, "evidence_task copa is one of the tasks"),
        ({"preset": "paper", "warm_start": "energy"}, "warm_start energy needs activation exp"),
        ({"dtype": "fp16"}, "Input should be 'auto', 'fp32' or 'bf16'"),
        ({"lr": math.nan}, "lr"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetatrainConfig(**{"model": "m", "tasks": ("copa",)} | changes)


def test_probes_have_their_earlier_name_in_files() -> None:
    config = MetatrainConfig(model="m", tasks=("copa",), directions=4)
    assert config.probes == 4 and "probes" not in config.stored() and config.stored()["directions"] == 4
    assert MetatrainConfig(**config.stored()) == config
    assert MetatrainConfig(model="m", tasks=("copa",), directions=4, probes=2).probes == 2


def test_a_preset_gives_way_to_what_is_said() -> None:
    paper = MetatrainConfig(model="m", tasks=("copa",), preset="paper", tuner_lr=0.2)
    assert (paper.activation, paper.recurrent, paper.tuner_optimizer, paper.tuner_lr) == ("abs", "sigma", "sgd", 0.2)
