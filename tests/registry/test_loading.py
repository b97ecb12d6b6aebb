"""A card named in any way becomes networks for the blocks of a model, or an error that says why not."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import zoft
import zoft.optim
import zoft.registry
from zoft.errors import CardError, ModelError
from zoft.model.fingerprint import base_hash
from zoft.model.load import Loaded
from zoft.registry import Card, LocalStore, find_tuner, load, open_card
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import statistics, trainable_blocks

from .conftest import disturbed, working_card

FACTS = torch.Generator().manual_seed(5)


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path: Path):
    """``saved(family, name, change, **config)``: a model folder, loaded."""

    def make(family: str = "llama", name: str = "base", seed: int | None = None, **config: object) -> Loaded:
        model: PreTrainedModel = tiny_model(family, **config)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return zoft.load(tmp_path / name, device="cpu")

    return make


def names(model: torch.nn.Module) -> list[str]:
    return [block.name for block in trainable_blocks(model)]


def card_of(loaded: Loaded, **changes: object) -> Card:
    net = disturbed(PertNN(names(loaded.model), hidden=4))
    return working_card(loaded.model, base_hash(loaded.path), net, **changes)


def same_scales(tuner: zoft.registry.Tuner, card: Card) -> bool:
    """Whether the cut networks give each of their blocks what the whole card gives it, on made-up inputs."""
    whole = zoft.registry.unpack(card)
    facts = torch.rand(len(whole.names), 2, generator=FACTS, dtype=torch.float64)
    before = Recurrent(0.7, 0.6, torch.linspace(0.5, 2, len(whole.names), dtype=torch.float64))
    rows = [whole.names.index(name) for name in tuner.networks.names]
    cut = tuner.networks(facts[rows], Recurrent(0.7, 0.6, before.scales[rows]))
    return torch.allclose(cut, whole(facts, before)[rows], rtol=1e-6, atol=0) and cut.unique().numel() > 1


def test_file_digest_and_auto_name_the_same_card(saved, tmp_path: Path) -> None:
    loaded = saved()
    card = card_of(loaded)
    card.save(tmp_path / "a.tuner.safetensors")
    digest = LocalStore().add(card)
    for source in (tmp_path / "a.tuner.safetensors", str(tmp_path / "a.tuner.safetensors"), digest, digest[:6], "auto"):
        tuner = load(source, loaded.model)
        assert (tuner.digest, tuner.match.kind, tuner.metadata) == (digest, "same base", card.metadata)
        assert tuner.networks.names == names(loaded.model) and same_scales(tuner, card)
        assert not any(parameter.requires_grad for parameter in tuner.networks.parameters())
    elsewhere = LocalStore(tmp_path / "store")
    with pytest.raises(CardError, match=r"none of the 0 cards in .*store fits"):
        load("auto", loaded.model, store=elsewhere)
    assert find_tuner(loaded.model, loaded.path, elsewhere) is None
    assert find_tuner(loaded.model, loaded.path).digest == digest


def test_the_snippet_of_the_documentation(saved) -> None:
    """``tuner = load(...)``, ``ZOFineTuner(model, tuner, ...)``, a step: the scales are those of the networks."""
    loaded = saved()
    digest = LocalStore().add(card_of(loaded))
    tokens = torch.arange(3, 27).view(2, 12)
    tuner = zoft.registry.load(digest[:8], loaded.model)
    expected = tuner.networks(statistics(trainable_blocks(loaded.model)), Recurrent.start(len(tuner.networks.names)))
    records = []
    optimizer = zoft.optim.ZOFineTuner(loaded.model, tuner, lr=1e-6, eps=1e-3, journal=records.append)
    optimizer.step(lambda: loaded.model(tokens, labels=tokens).loss)
    ratios = torch.tensor(records[0].scales) / expected
    assert torch.allclose(ratios, ratios[0].expand_as(ratios), rtol=1e-5) and expected.unique().numel() > 1


def test_the_folder_is_the_models_own_or_the_one_that_is_named(saved, tiny_model) -> None:
    loaded = saved()
    LocalStore().add(card_of(loaded))
    bare = tiny_model("llama")  # the same weights, made in memory
    with pytest.raises(ModelError, match=r"does not say where it was loaded from; name it with folder="):
        load("auto", bare)
    assert load("auto", bare, folder=loaded.path).match.kind == "same base"


def test_a_card_made_on_a_tied_model_drives_an_untied_one(saved) -> None:
    """The head is unknown to the card: it has no network, and a note reports it."""
    base = saved("qwen2")
    card = card_of(base)
    untied = saved("qwen2", "untied", tie_word_embeddings=False)
    LocalStore().add(card)
    tuner = load("auto", untied.model)
    assert tuner.networks.names == names(base.model) and "lm_head.weight" in names(untied.model)
    assert "sigma = 1 for 1 blocks that the card does not know (lm_head.weight)" in tuner.match.explanation
    assert same_scales(tuner, card)


def test_a_card_made_on_an_untied_model_drives_a_tied_one(saved) -> None:
    base = saved("qwen2", tie_word_embeddings=False)
    card = card_of(base)
    tied = saved("qwen2", "tied")
    LocalStore().add(card)
    tuner = load("auto", tied.model)
    assert tuner.networks.names == names(tied.model) == [n for n in names(base.model) if n != "lm_head.weight"]
    assert "lm_head.weight of the card not used" in tuner.match.explanation
    assert same_scales(tuner, card)


def test_blocks_in_another_order_keep_their_networks(saved) -> None:
    loaded = saved()
    card = card_of(loaded)
    shuffled = sorted(names(loaded.model), reverse=True)
    net = zoft.registry.unpack(card, shuffled)
    whole = zoft.registry.unpack(card)
    facts = torch.rand(len(shuffled), 2, generator=FACTS, dtype=torch.float64)
    order = [whole.names.index(name) for name in shuffled]
    start = Recurrent.start(len(shuffled))
    torch.testing.assert_close(net(facts[order], start), whole(facts, start)[order], rtol=1e-6, atol=0)


def test_a_stranger_needs_force_and_auto_never_takes_it(saved, tmp_path: Path) -> None:
    card = card_of(saved())
    stranger = saved(name="stranger", seed=1)
    file = tmp_path / "a.tuner.safetensors"
    card.save(file)
    LocalStore().add(card)
    with pytest.raises(CardError, match=r"stranger to org/base: same blocks, but .* \(--force uses it anyway\)"):
        load(file, stranger.model)
    tuner = load(file, stranger.model, force=True)
    assert tuner.match.kind == "stranger" and same_scales(tuner, card)
    for force in (False, True):
        with pytest.raises(CardError, match="none of the 1 cards"):
            load("auto", stranger.model, force=force)


def test_another_architecture_is_refused_even_by_force(saved, tmp_path: Path) -> None:
    file = tmp_path / "a.tuner.safetensors"
    card_of(saved("opt")).save(file)
    for force in (False, True):
        with pytest.raises(CardError, match=r"none of its \d+ blocks is among the model's \d+"):
            load(file, saved("llama", "other").model, force=force)
    card_of(saved("llama", "deep", num_hidden_layers=3)).save(file)
    with pytest.raises(CardError, match=r"another architecture, org/base: the model lacks 9 of the card's blocks"):
        load(file, saved("llama", "other").model, force=True)
    deeper = saved("llama", "deeper", num_hidden_layers=4)
    card_of(saved("llama", "wide", hidden_size=64)).save(file)
    with pytest.raises(CardError, match=r"another architecture, org/base: \d+ blocks have another shape"):
        load(file, deeper.model, force=True)


def test_a_card_for_adapters_is_refused(saved, tmp_path: Path) -> None:
    """Its blocks are adapters, which the model does not have."""
    loaded = saved()
    adapters = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 2), "lora_B": torch.nn.Linear(2, 4)})
    file = tmp_path / "a.tuner.safetensors"
    working_card(adapters, base_hash(loaded.path), trainable="lora").save(file)
    with pytest.raises(CardError, match=r"covers LoRA adapters, and none of its 4 blocks is among the model's"):
        load(file, loaded.model, force=True)


def test_what_is_no_card_is_said(tmp_path: Path) -> None:
    for source in ("x/a.safetensors", str(tmp_path / "absent.tuner.safetensors"), "abc", "model", Path("org/name")):
        with pytest.raises(
            CardError, match=r"is neither a local file, nor the beginning of a digest in the store .*auto"
        ):
            open_card(source)
    with pytest.raises(CardError, match=r"no card in .* has a digest that begins with abcd; see: zoft registry ls"):
        open_card("abcd")
    with pytest.raises(CardError, match=r"org/name@main/tuner.safetensors: the Hub cannot be reached \(offline mode"):
        open_card("org/name@main")
