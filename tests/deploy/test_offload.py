"""A run whose weights are on disk is the run whose weights are in memory, to the last bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune, replay
from zoft.deploy.journal import read_journal

from .conftest import same, stopped_at, with_, without_times

HALF = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(5)}
HALF |= {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
IN_ONE_LINE = ",".join(f"{module}={place}" for module, place in HALF.items())


def bits(folder: Path) -> dict[str, list]:
    """Every tensor in the safetensors files of ``folder``."""
    (file,) = folder.glob("*.safetensors")
    return {name: tensor.tolist() for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("places", ["auto", {"": "disk"}, HALF])
def test_records_scores_and_weights_are_the_same(config: FinetuneConfig, tmp_path: Path, dtype, places) -> None:
    plain = finetune(with_(config, dtype=dtype, steps=6))
    offloaded = with_(config, dtype=dtype, steps=6, device_map=places, out=tmp_path / "offloaded")
    assert without_times(finetune(offloaded)) == without_times(plain)
    assert same(config.out, offloaded.out)
    records = [read_journal(out / "journal").steps for out in (config.out, offloaded.out)]
    assert records[0] == records[1] and len(records[0]) == 6
    assert replay(config.model, offloaded.out, tmp_path / "replayed").verified
    scores = [
        evaluate_model(EvalConfig(model=str(config.out / "model"), data=config.data, device_map=device_map))
        for device_map in (None, places)
    ]
    assert scores[0].eval_loss == scores[1].eval_loss


def test_a_run_on_disk_is_resumed(config: FinetuneConfig, tmp_path: Path) -> None:
    whole = finetune(config)
    offloaded = with_(config, device_map={"": "disk"}, out=tmp_path / "offloaded")
    stopped_at(offloaded, 7)
    assert without_times(finetune(offloaded, resume=True)) == without_times(whole)
    assert same(config.out, offloaded.out)


def test_a_run_is_resumed_where_its_weights_lie_elsewhere(config: FinetuneConfig, tmp_path: Path) -> None:
    whole = finetune(config)
    moved = with_(config, out=tmp_path / "moved")
    stopped_at(moved, 7)
    assert without_times(finetune(with_(moved, device_map={"": "disk"}), resume=True)) == without_times(whole)


@pytest.mark.parametrize("places", ["disk", IN_ONE_LINE])
def test_a_run_is_replayed_where_it_was_not_made(config: FinetuneConfig, tmp_path: Path, places) -> None:
    """Of a plain run the replay lies on disk, of a run on disk it is plain; after any step, in half precision too."""
    plain = with_(config, dtype="bf16", steps=5, eval_every=5)
    spread = with_(plain, device_map=places, out=tmp_path / "spread")
    for run, device_map in ((plain, places), (spread, None)):
        finetune(run)
        for step in (None, 3):
            out = tmp_path / f"{run.out.name}-{step}"
            found = replay(config.model, run.out, out, step=step, device_map=device_map)
            assert found.verified is (step is None)
    assert bits(tmp_path / "run-None") == bits(tmp_path / "spread-None") == bits(plain.out / "model")
    assert bits(tmp_path / "run-3") == bits(tmp_path / "spread-3") != bits(tmp_path / "run-None")


# -- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "places"), [("mezo", HALF), ("adam", {"": "disk"})])
@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_an_adapter_of_a_model_on_disk_is_that_of_the_model(config, tmp_path: Path, mode, method, places) -> None:
    changes = {mode: True, "method": method, "probes": None, "lr": None, "steps": 6, "eval_every": 2, "test_size": 8}
    plain = with_(config, **changes, dtype="bf16" if method == "mezo" else "fp32")
    spread = with_(plain, device_map=places, out=tmp_path / "spread")
    expected = finetune(plain)
    assert expected.kept_step
    stopped_at(spread, 3)
    assert without_times(finetune(spread, resume=True)) == without_times(expected)
    records = [read_journal(run.out / "journal") for run in (plain, spread)]
    assert records[0].steps == records[1].steps and len(records[0].steps) == 6
    assert records[0].header.start == records[1].header.start is not None
    assert bits(plain.out / "model") == bits(spread.out / "model")
    scores = [
        evaluate_model(EvalConfig(model=str(plain.out / "model"), data=config.data, device_map=device_map))
        for device_map in (None, places)
    ]
    assert scores[0].eval_loss == scores[1].eval_loss
    if method == "mezo":
        for run, device_map in ((plain, places), (spread, None)):
            out = tmp_path / f"{run.out.name}-replayed"
            assert replay(config.model, run.out, out, device_map=device_map).verified
            assert bits(out) == bits(plain.out / "model")


@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_an_adapter_is_trained_further_on_a_model_on_disk(config, tmp_path: Path, mode) -> None:
    first = with_(config, **{mode: True}, lr=None, steps=4, eval_every=2)
    finetune(first)
    further = with_(first, model=str(first.out / "model"), **{mode: None}, out=tmp_path / "further")
    spread = with_(further, device_map={"": "disk"}, out=tmp_path / "spread")
    assert without_times(finetune(further)) == without_times(finetune(spread))
    assert bits(further.out / "model") == bits(spread.out / "model") != bits(first.out / "model")
