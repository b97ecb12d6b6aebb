"""The cards in ``tuners/``: whole, described, and found by ``auto`` without a network."""

import pytest

import zoft
from zoft.registry import MAX_BYTES, find_tuner, load
from zoft.registry.stores import shipped

FOLDER = shipped.folder()  # before the fixture that hides it


@pytest.fixture(autouse=True)
def as_shipped(no_shipped_cards: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "folder", lambda: FOLDER)


def test_every_card_is_whole_and_described() -> None:
    found = shipped.shipped_cards()
    assert found, "no card in tuners/"
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for file in FOLDER.glob("*.tuner.safetensors"):
        assert f"`{file.name}`" in page and f"--out tuners/{file.name}" in page
    for one in found:
        metadata = one.card.metadata
        assert metadata.evidence and metadata.verdict and metadata.base.hash and metadata.recommended.lr
        assert "/" not in metadata.base.id or metadata.base.id.count("/") == 1
        assert len(one.card.content) < MAX_BYTES
        assert metadata.recommended.lr in {row.lr for row in metadata.longest_runs}, "found in the longest runs"


@pytest.mark.parametrize("base", ["stories260k", "smollm2_gguf"])
def test_a_base_has_its_card_offline(base: str, request: pytest.FixtureRequest) -> None:
    """SmolLM2 as it is converted from its GGUF: the card has the hash of the conversion."""
    loaded = zoft.load(request.getfixturevalue(base), device="cpu")
    tuner = load("auto", loaded.model, folder=loaded.path)
    assert (tuner.match.kind, tuner.place) == ("same base", "shipped with zoft")
    found = find_tuner(loaded.model, loaded.path)
    assert found is not None and found.digest == tuner.digest
