"""A run on a CPU without instructions for half precision."""

from pathlib import Path

import pytest
import torch

from tests.deploy.conftest import same, stopped_at, with_, without_times
from zoft.deploy import Event, FinetuneConfig, Warned, finetune, replay
from zoft.weights import products


def test_it_is_resumed_and_replayed(config: FinetuneConfig, tmp_path: Path, monkeypatch) -> None:
    multiplied = []
    linear = products.WIDENED[torch.nn.functional.linear]
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setitem(
        products.WIDENED,
        torch.nn.functional.linear,
        lambda *args: (multiplied.append(args[1].shape), linear(*args))[1],
    )
    config = with_(config, dtype="bf16")
    result = finetune(config)
    assert len(set(multiplied)) > 3
    other = with_(config, out=tmp_path / "other")
    stopped_at(other, 6)
    assert without_times(finetune(other, resume=True)) == without_times(result)
    assert same(config.out, other.out)
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype: False)
    assert replay(config.model, config.out, tmp_path / "replayed").verified


@pytest.mark.parametrize(
    ("method", "dtype", "warned"), [("adam", "bf16", True), ("adam", "fp32", False), ("mezo", "bf16", False)]
)
def test_gradients_are_said_to_be_slow(
    method: str, dtype: str, warned: bool, config: FinetuneConfig, monkeypatch
) -> None:
    monkeypatch.setattr(products, "lacks_instructions", lambda asked: asked == torch.bfloat16)
    events: list[Event] = []
    finetune(with_(config, method=method, dtype=dtype, steps=1), on_event=events.append)
    assert warned is any(isinstance(event, Warned) and "no bfloat16 instructions" in event.message for event in events)
