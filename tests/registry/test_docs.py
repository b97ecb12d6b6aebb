"""A reader written from docs/cards.md alone computes what zoft computes."""

import re
from pathlib import Path

import pytest
import torch

from zoft.pertnn import PertNN, Recurrent, normalise
from zoft.registry.card import Card, TunerCard
from zoft.registry.samples import sample_positions

PAGE = (Path(__file__).parents[2] / "docs" / "cards.md").read_text(encoding="utf-8")
CARD = Path(__file__).parent / "data" / "format-1.tuner.safetensors"


def test_the_reader_on_the_page_computes_the_scales_of_a_card() -> None:
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], names)
    card = Card.load(CARD)
    blocks, network = card.metadata.blocks, card.metadata.network
    net = PertNN(
        [block.name for block in blocks], levels=[level.granularity for level in network.levels], hidden=network.hidden
    )
    own = {f"levels.{k}.{part}": f"level{k}.{part}" for k in range(2) for part in ("w1", "b1", "w2", "b2")}
    net.load_state_dict({name: card.tensors[theirs] for name, theirs in own.items()})
    with torch.no_grad():
        sigma = net(card.tensors["base.statistics"].double(), Recurrent.start(len(blocks)))
    expected = normalise(sigma, torch.tensor([block.size for block in blocks])).tolist()
    assert len(set(expected)) > 3
    assert names["scales"](CARD) == pytest.approx(
        dict(zip([block.name for block in blocks], expected, strict=True)), rel=1e-5
    )


def test_the_page_names_every_field_and_the_positions() -> None:
    fields = TunerCard.model_fields
    for name in fields:
        assert f"`{name}" in PAGE
    assert ", ".join(map(str, sample_positions("model.norm.weight", 64))) in PAGE.replace("\n", " ")
