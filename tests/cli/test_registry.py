"""``zoft registry``: keep, inspect and match tuner cards."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.registry.conftest import make_card
from zoft.cli import registry
from zoft.errors import CardError
from zoft.model.fingerprint import base_hash
from zoft.model.load import load
from zoft.registry import Card, sample_weights
from zoft.weights.blocks import trainable_blocks


@pytest.fixture
def zoft() -> Callable[..., Result]:
    """The commands alone: errors reach the test as they are raised."""
    group = typer.Typer()
    registry.register(group)

    def run(*arguments: object, fails: bool = False) -> Result:
        result = CliRunner().invoke(group, ["registry", *map(str, arguments)])
        if result.exception is not None and not fails:
            raise result.exception
        return result

    return run


@pytest.fixture
def card_file(model_folder: Path, tmp_path: Path) -> Path:
    blocks = trainable_blocks(load(model_folder, device="cpu").model)
    card = make_card(blocks, base_hash(model_folder))
    Card(card.metadata, {**card.tensors, "base.samples": sample_weights(blocks)}).save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_add_ls_rm(zoft, card_file: Path) -> None:
    digest = Card.load(card_file).digest
    assert json.loads(zoft("ls", "--json").stdout) == {"cards": []}
    assert json.loads(zoft("add", card_file, "--json").stdout) == {"digest": digest}
    (row,) = json.loads(zoft("ls", "--json").stdout)["cards"]
    assert (row["digest"], row["base_id"], row["blocks"]) == (digest, "org/base", 21)
    assert digest[:16] in zoft("ls").stdout
    assert json.loads(zoft("rm", digest[:8], "--json").stdout) == {"digest": digest}
    assert json.loads(zoft("ls", "--json").stdout) == {"cards": []}


def test_show_tells_evidence_and_draws_scales(zoft, card_file: Path, tmp_path: Path) -> None:
    shown = zoft("show", card_file)
    assert "org/base" in shown.stdout and "the tuner wins: 0.5 < 0.6" in shown.stdout
    assert "sst2" in shown.stderr and "1.0000" in shown.stderr
    assert "self_attn.v_proj" in shown.stderr and any(bar in shown.stderr for bar in "▁█")
    told = json.loads(zoft("show", card_file, "--json", "--plot", tmp_path / "scales.png").stdout)
    assert told["recommended"] == {"lr": 1e-5, "eps": 1e-3}
    assert len(told["scales"]) == 21 and min(told["scales"].values()) < 1 < max(told["scales"].values())
    assert (tmp_path / "scales.png").read_bytes().startswith(b"\x89PNG")


def test_verify_names_a_base_that_changed(zoft, card_file: Path, model_folder: Path) -> None:
    verified = json.loads(zoft("verify", card_file, "--base", model_folder, "--json").stdout)
    assert verified == {"digest": Card.load(card_file).digest, "base": "org/base", "base_verified": True}
    weights = model_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        CardError, match=r"is not the base of this card, or has changed since: its base hash is [0-9a-f]{16}"
    ):
        zoft("verify", card_file, "--base", model_folder)


def test_match(zoft, card_file: Path, model_folder: Path) -> None:
    zoft("add", card_file)
    (row,) = json.loads(zoft("match", model_folder, "--json").stdout)["matches"]
    assert row["kind"] == "same base"
    assert row["correlation"] == pytest.approx(1)
    assert row["explanation"].startswith("same base: the card was made for these weights (org/base")


def test_a_card_that_is_none(zoft, tmp_path: Path) -> None:
    (tmp_path / "card").write_bytes(b"PK")
    with pytest.raises(CardError, match="cut short"):
        zoft("show", tmp_path / "card")
    with pytest.raises(CardError, match=r"absent is neither a local file, nor the beginning of a digest in the store"):
        zoft("show", "absent")


def test_a_bad_file_in_the_store_is_named(zoft, zoft_home: Path, card_file: Path) -> None:
    zoft("add", card_file)
    (zoft_home / "tuners" / f"{'e' * 64}.tuner.safetensors").write_bytes(b"torn")
    listed = zoft("ls", "--json")
    assert len(json.loads(listed.stdout)["cards"]) == 1
    assert "cut short" in listed.stderr and "zoft registry rm eeeeeeeeeeeeeeee" in listed.stderr
