"""A run whose weights are on disk is the run whose weights are in memory, to the last bit."""

from pathlib import Path

import pytest

from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune, replay
from zoft.deploy.journal import read_journal

from .conftest import same, stopped_at, with_, without_times

HALF = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(5)}
HALF |= {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}


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
