"""What goes into a card comes out of it."""

import datetime

import pytest
import torch

from zoft.errors import CardError
from zoft.registry import BaseSpec, BlockSpec, Card, TunerCard, first_scales, pack, sample_weights, unpack
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import normalise
from zoft.weights.blocks import architecture_hash, statistics, trainable_blocks


def carded(net: PertNN, model: torch.nn.Module, base_hash: str | None = "a" * 64) -> Card:
    blocks = trainable_blocks(model)
    spec, tensors = pack(net)
    if base_hash:
        tensors |= {"base.statistics": statistics(blocks).float(), "base.samples": sample_weights(blocks)}
    metadata = TunerCard(
        base=BaseSpec(id="tiny", hash=base_hash, architecture_hash=architecture_hash(blocks)),
        blocks=tuple(BlockSpec(name=block.name, shape=block.shape) for block in blocks),
        network=spec,
        created=datetime.date(2026, 11, 23),
    )
    return Card.parse(Card(metadata, tensors).content)


def disturbed(net: PertNN) -> PertNN:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data.half().float()  # a card keeps float16
    return net


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("form", ["pooled", "layer", "tempered", "paper"])
def test_a_network_that_went_through_a_card_gives_the_same_scales(tiny_model, family: str, form: str) -> None:
    model = tiny_model(family)
    names = [block.name for block in trainable_blocks(model)]
    make = {
        "pooled": lambda: PertNN(names, hidden=8),
        "layer": lambda: PertNN(names, levels=("layer",), hidden=3),
        "tempered": lambda: PertNN(names, hidden=8, strength=0.25),
        "paper": lambda: PertNN.paper(names, seed=4),
    }
    net = disturbed(make[form]())
    card = carded(net, model)
    twin = unpack(card)
    before = Recurrent(0.7, 0.6, torch.linspace(0.5, 2, len(names), dtype=torch.float64))
    facts = statistics(trainable_blocks(model))
    expected = net(facts, before)
    assert expected.unique().numel() > 1
    assert torch.equal(twin(facts, before), expected)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert card.metadata.network.recurrent == ("sigma" if form == "paper" else "s")


def test_first_scales(tiny_model) -> None:
    model = tiny_model("llama")
    blocks = trainable_blocks(model)
    net = PertNN([block.name for block in blocks], hidden=8)
    assert first_scales(carded(net, model)).tolist() == [1.0] * len(blocks)
    sigma = disturbed(net)(statistics(blocks).float().double(), Recurrent.start(len(blocks)))
    expected = normalise(sigma, torch.tensor([block.size for block in blocks]))
    torch.testing.assert_close(first_scales(carded(net, model)), expected)


def test_no_scales_without_the_weights_of_the_base(tiny_model) -> None:
    model = tiny_model("llama")
    net = PertNN([block.name for block in trainable_blocks(model)], hidden=8)
    with pytest.raises(CardError, match="knows the architecture of tiny, but not its weights"):
        first_scales(carded(net, model, base_hash=None))


def test_weights_beyond_float16_are_refused(tiny_model) -> None:
    model = tiny_model("llama")
    net = PertNN([block.name for block in trainable_blocks(model)], hidden=8)
    net.levels[0].b2.data += 1e6
    with pytest.raises(CardError, match=r"level0\.b2 holds NaN or infinite numbers"):
        carded(net, model)
