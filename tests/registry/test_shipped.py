"""The cards in ``tuners/``: whole, described, and found by ``auto`` without a network."""

from pathlib import Path

import pytest

from zoft import models
from zoft.registry import find, load, shipped

FOLDER = shipped.folder()  # before the fixture that hides it


@pytest.fixture(autouse=True)
def as_shipped(no_shipped_cards: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "folder", lambda: FOLDER)


def test_every_card_is_whole_and_described() -> None:
    found = shipped.shipped()
    assert found, "no card in tuners/"
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for file in FOLDER.glob("*.tuner.safetensors"):
        assert f"`{file.name}`" in page and f"--out tuners/{file.name}" in page
    for one in found:
        said = one.card.metadata
        assert said.evidence and said.verdict and said.base.hash and said.recommended.lr
        assert "/" not in said.base.id or said.base.id.count("/") == 1


def test_stories260k_has_its_card_offline(stories260k: Path) -> None:
    loaded = models.load(stories260k, device="cpu")
    tuner = load("auto", loaded.model, folder=loaded.path)
    assert (tuner.match.kind, tuner.place) == ("same base", "shipped with zoft")
    found = find(loaded.model, loaded.path)
    assert found is not None and found.digest == tuner.digest
