"""Meta-training of a base that fits no single device gives the card of one that does, to the last bit."""

from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from zoft.errors import Interrupted
from zoft.events import MetaStepDone
from zoft.metatrain import MetatrainConfig, activations, metatrain, start
from zoft.metatrain import sampling as data
from zoft.metatrain.rounding import rounding
from zoft.metatrain.teacher import AdamTeacher, SGDTeacher
from zoft.model.load import load, restore_
from zoft.model.offload import is_memory_mapped
from zoft.weights import streamed
from zoft.weights.blocks import trainable_blocks
from zoft.weights.streamed import streaming

from .conftest import IDS

PARTS = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")}
PARTS |= {"model.layers.1": "disk", "lm_head": "cpu"}


@pytest.fixture
def config(model_folder: Path, rows: Path, tmp_path: Path) -> MetatrainConfig:
    return MetatrainConfig(
        model=str(model_folder),
        data=rows,
        steps=5,
        reset_every=2,
        lr=1e-3,
        teacher_lr=1e-3,
        batch_size=4,
        evidence=0,
        compare_every=2,
        out=tmp_path / "plain" / "card",
    )


def with_(config: MetatrainConfig, **changes) -> MetatrainConfig:
    return MetatrainConfig.model_validate({**config.model_dump(), **changes})


@pytest.mark.parametrize(
    ("places", "changes"),
    [
        ("cpu", {}),
        ("disk", {}),
        (PARTS, {}),
        (PARTS, {"dtype": "bf16", "checkpoint_activations": True, "warm_start": "signal"}),
        ("disk", {"dtype": "bf16", "teacher": "sgd", "teacher_lr": 1e-2, "warm_start": "energy"}),
        (PARTS, {"lora": True}),
        ("disk", {"prefix": True, "dtype": "bf16"}),
    ],
)
def test_the_card_is_the_same(config, tmp_path: Path, places, changes) -> None:
    plain = with_(config, **changes)
    spread = with_(plain, device_map=places, out=tmp_path / "spread" / "card")
    metatrain(plain)
    points: list[MetaStepDone] = []

    def listen(event: object) -> None:
        points.extend([event] if isinstance(event, MetaStepDone) else [])

    with pytest.raises(Interrupted):
        metatrain(spread, on_event=listen, cancelled=lambda: len(points) == 3)
    metatrain(spread, resume=True)
    assert plain.out.read_bytes() == spread.out.read_bytes()
    files = [settings.out.with_name("card.run") / "metrics.jsonl" for settings in (plain, spread)]
    assert files[0].read_bytes() == files[1].read_bytes() and len(files[0].read_text().splitlines()) == 5


def test_the_evidence_is_the_same(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoft.metatrain.evidence.MIN_STEPS", 1)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "dev"):
        (data / f"{split}.jsonl").write_text(config.data.read_text())
    plain = with_(config, data=data, dev_size=24, steps=24, reset_every=12, evidence=None, batch_size=2)
    spread = with_(plain, device_map=PARTS, out=tmp_path / "spread" / "card")
    assert metatrain(plain).evidence_forwards > 0
    metatrain(spread)
    assert plain.out.read_bytes() == spread.out.read_bytes()


def test_a_job_goes_on_where_its_base_lies_elsewhere(config, tmp_path: Path) -> None:
    metatrain(config)
    other = with_(config, out=tmp_path / "other" / "card")
    points: list[object] = []
    with pytest.raises(Interrupted):
        metatrain(other, on_event=points.append, cancelled=lambda: any(isinstance(p, MetaStepDone) for p in points))
    metatrain(with_(other, device_map="disk"), resume=True)
    assert other.out.read_bytes() == config.out.read_bytes()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_reset_gives_every_weight_its_value_where_it_is(tiny_model, tokenizer, tmp_path: Path, stored) -> None:
    tiny_model("llama", dtype=stored).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base", dtype="fp32", device_map=PARTS)
    before = list(loaded.model.parameters())
    with torch.no_grad():
        for parameter in before:
            parameter.add_(1)
    restore_(loaded)
    expected = load(tmp_path / "base", dtype="fp32").model.parameters()
    for parameter, was, value in zip(loaded.model.parameters(), before, expected, strict=True):
        assert parameter is was and torch.equal(parameter, value)
    on_disk = {name for name, parameter in loaded.model.named_parameters() if is_memory_mapped(parameter)}
    assert on_disk == {name for name, _ in loaded.model.named_parameters() if ".layers.1." in name}


def test_what_is_kept_for_a_block_lies_beside_it(model_folder: Path) -> None:
    """Of a part on disk moments and sums are on disk, too: they are as large as what did not fit."""
    loaded = load(model_folder, dtype="fp32", device_map=PARTS)
    blocks = trainable_blocks(loaded.model)
    adam, sgd = AdamTeacher(blocks, lr=1e-3), SGDTeacher(blocks, lr=1e-3)
    for i, block in enumerate(blocks):
        block.parameter.grad = torch.ones_like(block.parameter)
        adam.begin_step()
        adam.step_block(i)
        sgd.step_block(i)
    for i, block in enumerate(blocks):
        kept = (*adam.moments[i], sgd.velocity[i])
        assert [is_memory_mapped(one) for one in kept] == [is_memory_mapped(block.parameter)] * 3
        assert all(one.any() for one in kept)


# -- host memory beside a device ----------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """A device that has numbers: "cpu:0", to which torch copies; whoever reads weights beside others is on it."""
    made: list[StorageWeakRef] = []

    def device_of(args: tuple, kwargs: dict) -> torch.device | None:
        kinds = {isinstance(tensor, torch.nn.Parameter) for tensor in streamed.tensors_in((*args, *kwargs.values()))}
        return torch.device("cpu:0") if len(kinds) == 2 else None

    class Streamed(streamed.StreamedWeights):
        def note(self, copy: torch.Tensor, source: torch.Tensor) -> None:
            assert copy.data_ptr() != source.data_ptr()
            made.append(StorageWeakRef(copy.untyped_storage()))
            super().note(copy, source)

    monkeypatch.setattr(streamed, "target_device", device_of)
    for module in (data, start, activations):
        monkeypatch.setattr(module, "streaming", lambda model, again=False: Streamed(again=again))
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"warm_start": "signal"},
        {"dtype": "bf16"},
        {"dtype": "bf16", "checkpoint_activations": True, "warm_start": "signal"},
        {"lora": True},
        {"prefix": True},
    ],
    ids=str,
)
def test_gradients_come_back_to_where_the_weights_are(config, tmp_path: Path, copies, monkeypatch, changes) -> None:
    plain = with_(config, **changes)
    far = with_(plain, out=tmp_path / "far" / "card")
    metatrain(far)
    assert len(copies) > 500
    for module in (data, start, activations):
        monkeypatch.setattr(module, "streaming", streamed.streaming)
    count = len(copies)
    metatrain(plain)
    assert len(copies) == count
    assert far.out.read_bytes() == plain.out.read_bytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_copy_waits_on_the_device_for_the_backward_pass(config, copies, dtype) -> None:
    config = with_(config, dtype=dtype)
    loaded = data.load_base(config, lambda _: None)
    blocks, task = trainable_blocks(loaded.model), data.prepare(None, config, loaded)
    closure = data.closure_of(task, task.prepared.train[:4], loaded, config)
    with rounding(blocks, dtype, 0):
        loss = closure()
        alive = [ref for ref in copies if not ref.expired()]
        assert len(copies) > len(blocks) and not alive
        loss.backward()
    assert all(block.parameter.grad is not None for block in blocks)


@pytest.mark.parametrize("far", ["model.layers.0", "lm_head", "model.rotary_emb"])
def test_every_gradient_is_on_the_device_of_its_block(tiny_model, far: str) -> None:
    """Fake tensors have devices and no numbers, and refuse to be mixed."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.to("meta"))
    model.get_submodule(far).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with streaming(model):
            loss = model(IDS, position_ids=torch.arange(12)[None].expand(2, 12)).logits.sum()
        loss.backward()
    for block in trainable_blocks(model):
        assert block.parameter.grad is not None and block.parameter.grad.device == block.parameter.device
        assert (block.parameter.device.type == "meta") == block.name.startswith(far)
