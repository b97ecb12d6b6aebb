"""Tuners for LoRA and prefixes: the defaults, resets to the adapter's start, resuming, what the card says."""

import pytest
import torch

from zoft.errors import Interrupted, ModelError
from zoft.events import MetaStepDone
from zoft.metatrain import MetatrainConfig, metatrain
from zoft.model.adapters import LoRA, Prefix
from zoft.model.load import Loaded, load, restore_
from zoft.registry import Card
from zoft.weights.blocks import trainable_blocks


@pytest.fixture
def config(model_folder, rows, tmp_path) -> MetatrainConfig:
    return MetatrainConfig(
        model=str(model_folder),
        data=rows,
        lora=True,
        steps=6,
        reset_every=2,
        batch_size=4,
        evidence=0,
        compare_every=0,
        out=tmp_path / "a.tuner.safetensors",
    )


def with_(config: MetatrainConfig, **changes) -> MetatrainConfig:
    return MetatrainConfig.model_validate({**config.model_dump(), **changes})


def test_rates_are_those_of_adapters_unless_they_are_given() -> None:
    def made(**settings) -> tuple[float, float, float]:
        found = MetatrainConfig(model="m", tasks=("copa",), **settings)
        return found.lr, found.eps, found.teacher_lr

    assert made() == (1e-5, 1e-3, 1e-5)
    assert made(lora=True) == (1e-4, 1e-2, 1e-4)
    assert made(prefix={"tokens": 3}) == (1e-2, 1e-1, 1e-2)
    assert made(lora=True, eps=1e-3) == (1e-4, 1e-3, 1e-4)
    assert made(lora=False) == made()
    with pytest.raises(ValueError, match="lora and prefix are both asked for"):
        made(lora=True, prefix=True)


@pytest.mark.parametrize("adapter", [LoRA(), Prefix()], ids=["lora", "prefix"])
def test_every_reset_returns_the_adapter_to_its_start(config, monkeypatch, adapter) -> None:
    seen: list[list[torch.Tensor]] = []

    def noted(loaded: Loaded) -> None:
        moved = [block.parameter.detach().clone() for block in trainable_blocks(loaded.model)]
        restore_(loaded)
        seen.append(moved)
        seen.append([block.parameter.detach().clone() for block in trainable_blocks(loaded.model)])

    for module in ("trajectory", "trials"):
        monkeypatch.setattr(f"zoft.metatrain.{module}.restore_", noted)
    mode = {"lora": None, "prefix": None} | {adapter.mode: adapter.model_dump()}
    metatrain(with_(config, **mode))
    start = load(config.model, adapter=adapter, seed=config.seed, dtype="fp32")
    expected = [block.parameter for block in trainable_blocks(start.model)]
    assert len(seen) == 6
    for moved, restored in zip(seen[::2], seen[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(restored, expected, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_stopped_and_resumed_gives_the_same_card(config, tmp_path) -> None:
    metatrain(config)
    other = with_(config, out=tmp_path / "b.tuner.safetensors")
    points: list[object] = []
    with pytest.raises(Interrupted):
        metatrain(other, on_event=points.append, cancelled=lambda: len(train_points(points)) == 3)
    metatrain(other, resume=True)
    assert Card.load(other.card_file).digest == Card.load(config.card_file).digest


def train_points(events: list[object]) -> list[object]:
    return [event for event in events if isinstance(event, MetaStepDone)]


def test_the_evidence_of_a_card_for_prefixes(config, rows, tmp_path, monkeypatch) -> None:
    """The runs that test a tuner start from the adapter's start, too, and the card says what they trained."""
    monkeypatch.setattr("zoft.metatrain.evidence.MIN_STEPS", 1)
    data = tmp_path / "split"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.jsonl").write_text(rows.read_text())
    changes = {"data": data, "steps": 40, "reset_every": 20, "evidence": None, "dev_size": 24}
    metatrain(with_(config, lora=None, prefix=True, lr=1e-2, eps=1e-1, **changes))
    metadata = Card.load(config.card_file).metadata
    assert metadata.trainable.mode == "prefix" and metadata.trainable.settings == {"tokens": 5}
    assert len({row.loss_start for row in metadata.evidence}) == 1 and len(metadata.evidence) >= 8
    assert {block.name.rsplit(".", 1)[1] for block in metadata.blocks} == {"keys", "values"}
    assert metadata.recommended.eps == 1e-1


def test_activations_are_computed_again_with_lora_and_not_with_prefixes(config, tmp_path) -> None:
    metatrain(config)
    again = with_(config, checkpoint_activations=True, out=tmp_path / "b.tuner.safetensors")
    metatrain(again)
    one, two = Card.load(config.card_file), Card.load(again.card_file)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    with pytest.raises(ModelError, match=r"would append a prefix twice; leave out checkpoint_activations"):
        metatrain(with_(again, lora=None, prefix=True, out=tmp_path / "c.tuner.safetensors"))
