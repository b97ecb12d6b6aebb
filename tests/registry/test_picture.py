"""The scales of a tuner drawn over depth."""

import struct
import sys
from pathlib import Path

import pytest

from zoft.errors import ConfigError
from zoft.registry.card.picture import curves, draw_png, draw_text

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.self_attn.{part}" for i in range(3) for part in ("v_proj.weight", "v_proj.bias")),
    *(f"model.layers.{i}.experts.{j}.w1.weight" for i in range(3) for j in range(2)),
    "model.norm.weight",
]
SCALES = [4.0, 1.0, 0.5, 2.0, 0.5, 4.0, 0.5, 1.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.25]


def test_curves_follow_depth_and_pool_experts() -> None:
    drawn = {curve.label: curve for curve in curves(NAMES, SCALES)}
    assert list(drawn) == [
        "model.embed_tokens",
        "self_attn.v_proj",
        "self_attn.v_proj.bias",
        "experts.*.w1",
        "model.norm",
    ]
    assert drawn["self_attn.v_proj"].scales == pytest.approx([1, 2, 4])
    assert drawn["self_attn.v_proj"].mean == pytest.approx(2)
    assert drawn["experts.*.w1"].depths == (0, 1, 2)
    assert drawn["experts.*.w1"].scales == pytest.approx([2, 2, 1])
    assert drawn["model.norm"].depths == (None,)


def test_text() -> None:
    assert draw_text(NAMES, SCALES).splitlines() == [
        "scales from 0.25 (▁) to 4 (█)",
        "model.embed_tokens     4.000  █",
        "self_attn.v_proj       2.000  ▅▆█",
        "self_attn.v_proj.bias  0.500  ▃▃▃",
        "experts.*.w1           1.587  ▆▆▅",
        "model.norm             0.250  ▁",
    ]


def test_text_of_an_untrained_tuner_and_of_a_frozen_block() -> None:
    assert draw_text(["a.0.w", "a.1.w"], [1.0, 1.0]) == "every scale is 1\nw  1.000  ▄▄"
    assert "▁█" in draw_text(["a.0.w", "a.1.w"], [0.0, 1.0])


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_png(NAMES, SCALES, tmp_path / "scales.png")
    content = (tmp_path / "scales.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1080, 600)
    assert [file.name for file in tmp_path.iterdir()] == ["scales.png"]


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install 'zoft\\[plot\\]'"):
        draw_png(NAMES, SCALES, tmp_path / "scales.png")
