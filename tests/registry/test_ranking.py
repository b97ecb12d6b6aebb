"""The card that ``--tuner auto`` takes."""

import datetime

import pytest
import torch

from zoft.errors import CardError
from zoft.model.fingerprint import base_hash
from zoft.model.load import load
from zoft.registry import Card, LocalStore, ModelIdentity, discover, sample_weights
from zoft.registry import load as load_tuner
from zoft.weights.blocks import trainable_blocks

from .conftest import make_card


def card_for(model: torch.nn.Module, hash_: str, **changes: object) -> Card:
    blocks = trainable_blocks(model)
    card = make_card(blocks, hash_, **changes)
    return Card(card.metadata, {**card.tensors, "base.samples": sample_weights(blocks)})


def test_the_nearest_card_with_evidence_is_chosen(tiny_model, tokenizer, tmp_path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base", device="cpu")
    digest = base_hash(loaded.path)
    store, identity = LocalStore(), ModelIdentity.of(loaded.model, loaded.path)
    with pytest.raises(CardError, match=r"none of the 0 cards in .* fits the model\. Add one"):
        load_tuner("auto", loaded.model, store=store)

    stranger = tiny_model("llama")
    for parameter in stranger.parameters():
        parameter.data.neg_()
    refused = store.add(card_for(stranger, "1" * 64))
    other = store.add(card_for(tiny_model("opt"), "2" * 64))
    with pytest.raises(CardError, match=f"none of the 2 cards .* the nearest, {refused[:16]}: stranger to org/base"):
        load_tuner("auto", loaded.model, store=store)

    near = store.add(card_for(model, "3" * 64))
    newer = datetime.date(2027, 1, 1)
    unproven = store.add(card_for(model, digest, evidence=(), created=newer))
    proven = store.add(card_for(model, digest))
    store.path("f" * 64).write_bytes(b"torn")
    assert [one.digest for one in discover(identity, store)] == [proven, unproven, near, refused, other]
    chosen = load_tuner("auto", loaded.model, store=store)
    assert (chosen.digest, chosen.match.kind) == (proven, "same base")
    assert chosen.card.digest == proven
