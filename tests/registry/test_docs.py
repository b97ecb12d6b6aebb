"""A reader written from docs/cards.md alone computes what zoft computes."""

import re
from pathlib import Path

import pytest

from zoft.registry import Card, TunerCard, first_scales, sample_positions

PAGE = (Path(__file__).parents[2] / "docs" / "cards.md").read_text(encoding="utf-8")
CARD = Path(__file__).parent / "data" / "format-1.tuner.safetensors"


def test_the_reader_on_the_page_computes_the_scales_of_a_card() -> None:
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    card = Card.load(CARD)
    expected = first_scales(card).tolist()
    assert len(set(expected)) > 3
    assert names["scales"](CARD) == pytest.approx(
        dict(zip([block.name for block in card.metadata.blocks], expected, strict=True)), rel=1e-5
    )


def test_the_page_names_every_field_and_the_positions() -> None:
    fields = TunerCard.model_fields
    for name in fields:
        assert f"`{name}" in PAGE
    assert ", ".join(map(str, sample_positions("model.norm.weight", 64))) in PAGE.replace("\n", " ")
