"""A card finds its base and what was fine-tuned from it, and refuses everything else."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from zoft.errors import CardError
from zoft.model.fingerprint import base_hash
from zoft.registry import Card, ModelIdentity, TrainableSpec, lineage, sample_positions, sample_weights
from zoft.registry.match.matching import correlation, match
from zoft.weights.blocks import Block, statistics, trainable_blocks

from .conftest import make_card

POSITIONS = [
    26394475,
    19893319,
    26565336,
    20580524,
    21776802,
    15467717,
    4076676,
    10453515,
    19254825,
    3708272,
    21225467,
    3109601,
    26835709,
    16558547,
    462038,
    8131887,
]
BASE, OTHER = "ab" * 32, "12" * 32


def card_for(blocks: Sequence[Block], hash_: str = BASE, **changes: object) -> Card:
    card = make_card(blocks, hash_, **changes)
    measured = {"base.statistics": statistics(blocks).float(), "base.samples": sample_weights(blocks)}
    return Card(card.metadata, {**card.tensors, **measured})


def identity(blocks: Sequence[Block], hash_: str = OTHER, **details: object) -> ModelIdentity:
    return ModelIdentity(hash_, blocks, sample_weights(blocks), **details)


def fine_tuned(model: PreTrainedModel, steps: int, lr: float) -> PreTrainedModel:
    """A first-order fine-tune of ``model`` on random tokens: every step moves every weight by about ``lr``."""
    tuned = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(3, model.config.vocab_size, (4, 32), generator=generator)
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned


@pytest.fixture(scope="module")
def base(stories260k: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(stories260k).eval()


@pytest.fixture(scope="module")
def stranger(base: PreTrainedModel) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(base.config)


# -- real weights -------------------------------------------------------------------------------------------------


def test_same_base(base: PreTrainedModel, stories260k: Path) -> None:
    blocks = trainable_blocks(base)
    digest = base_hash(stories260k)
    found = match(card_for(blocks, digest), identity(blocks, digest))
    assert found.kind == "same base"
    assert found.correlation == pytest.approx(1, abs=1e-12)
    assert found.mapping.rows == tuple(range(47))
    assert found.difference == ""
    found.require()


def test_a_fine_tune_is_a_derivative(base: PreTrainedModel) -> None:
    card = card_for(trainable_blocks(base))
    blocks = trainable_blocks(fine_tuned(base, steps=40, lr=2e-3))
    found = match(card, identity(blocks))
    assert found.kind == "derivative"
    assert 0.98 < found.correlation < 0.995, "it was trained, and it is still known"
    assert found.explanation.startswith("derivative of org/base: sampled weights correlate 0.9")
    found.require()


def test_a_random_model_of_the_same_architecture_is_a_stranger(
    base: PreTrainedModel, stranger: PreTrainedModel
) -> None:
    card = card_for(trainable_blocks(base))
    blocks = trainable_blocks(stranger)
    found = match(card, identity(blocks))
    assert found.kind == "stranger"
    assert abs(found.correlation) < 0.1
    with pytest.raises(CardError, match=r"stranger to org/base: .* correlate -?0\.0\d\d .*--force uses it"):
        found.require()
    found.require(force=True)


def test_half_precision_is_the_same_base(base: PreTrainedModel) -> None:
    blocks = trainable_blocks(copy.deepcopy(base).bfloat16())
    found = match(card_for(trainable_blocks(base)), identity(blocks, BASE))
    assert found.kind == "same base"
    assert 0.999 < found.correlation < 1


def test_a_card_that_lies_about_its_base(base: PreTrainedModel, stranger: PreTrainedModel) -> None:
    blocks = trainable_blocks(stranger)
    found = match(card_for(trainable_blocks(base)), identity(blocks, BASE))
    with pytest.raises(CardError, match="names the base hash of this model, but holds other sampled weights"):
        found.require(force=True)


def test_another_vocabulary_keeps_its_network(base: PreTrainedModel) -> None:
    card = card_for(trainable_blocks(base))
    larger = copy.deepcopy(base)
    with torch.random.fork_rng():
        larger.resize_token_embeddings(520)
    blocks = trainable_blocks(larger)
    found = match(card, identity(blocks))
    assert found.kind == "derivative"
    assert found.mapping.resized == ("model.embed_tokens.weight",)
    assert found.mapping.rows == tuple(range(47))
    assert found.correlation == pytest.approx(1)
    assert "another vocabulary in model.embed_tokens.weight" in found.explanation
    assert found.difference == "~ model.embed_tokens.weight: 512 x 64 in the card, 520 x 64 in the model"


# -- blocks -------------------------------------------------------------------------------------------------------


def block(name: str, *shape: int) -> Block:
    generator = torch.Generator().manual_seed(len(name))
    return Block(name, torch.nn.Parameter(torch.randn(shape, generator=generator)))


def model_blocks() -> list[Block]:
    shapes = {"embed.weight": (50, 8), "layers.0.w": (8, 8), "layers.1.w": (8, 8), "norm.weight": (8,)}
    return [block(name, *shape) for name, shape in (shapes | {"head.weight": (50, 8), "head.bias": (50,)}).items()]


def matched(card_blocks: Sequence[Block], blocks: Sequence[Block], **options: object):
    return match(card_for(card_blocks), identity(blocks, **options))


def test_order_of_blocks_does_not_matter() -> None:
    blocks = model_blocks()
    found = matched(blocks, blocks[::-1])
    assert found.mapping.rows == (5, 4, 3, 2, 1, 0)
    assert found.correlation == pytest.approx(1)


def test_unknown_blocks_have_sigma_one_and_are_named() -> None:
    blocks = [*model_blocks(), *(block(f"extra.{i}.w", 3) for i in range(4))]
    found = matched(model_blocks(), blocks)
    assert found.kind == "derivative"
    assert found.mapping.rows == (0, 1, 2, 3, 4, 5, None, None, None, None)
    assert (
        "sigma = 1 for 4 blocks that the card does not know (extra.0.w, extra.1.w, extra.2.w, ...)" in found.explanation
    )
    assert found.difference.splitlines()[0] == "+ extra.0.w: 3 in the model only"


def test_a_resized_head_takes_its_bias_along() -> None:
    blocks = model_blocks()
    blocks[0], blocks[4], blocks[5] = block("embed.weight", 64, 8), block("head.weight", 64, 8), block("head.bias", 64)
    assert matched(model_blocks(), blocks).mapping.resized == ("embed.weight", "head.weight", "head.bias")


def test_a_vector_of_another_width_is_no_vocabulary() -> None:
    blocks = model_blocks()
    blocks[3] = block("norm.weight", 16)
    found = matched(model_blocks(), blocks)
    assert found.mapping.clashing == ("norm.weight",)
    with pytest.raises(CardError, match=r"another architecture, org/base: 1 blocks have another shape \(norm.weight\)"):
        found.require(force=True)


def test_another_depth_is_another_architecture() -> None:
    found = matched(model_blocks(), [b for b in model_blocks() if b.name != "layers.1.w"])
    assert found.kind == "incompatible"
    assert "the model lacks 1 of the card's blocks (layers.1.w)" in found.explanation
    assert found.difference == "- layers.1.w: 8 x 8 in the card only"


def test_an_error_shows_ten_differences() -> None:
    card_blocks = [block(f"layers.{i}.w", 4) for i in range(30)]
    with pytest.raises(CardError) as caught:
        matched(card_blocks, card_blocks[:15]).require()
    lines = str(caught.value).splitlines()
    assert lines[1] == "- layers.15.w: 4 in the card only"
    assert lines[-1] == "... and 5 more"
    assert len(lines) == 12


def test_a_head_that_the_model_ties_is_not_missed() -> None:
    card_blocks = model_blocks()[:5]
    found = matched(card_blocks, card_blocks[:4])
    assert found.kind == "derivative"
    assert found.mapping.missing == ("head.weight",)
    assert "head.weight of the card not used" in found.explanation


def test_a_full_card_with_lora_is_an_error_that_says_so() -> None:
    adapters = [block("layers.0.w.lora_A.default.weight", 2, 8), block("layers.0.w.lora_B.default.weight", 8, 2)]
    found = match(card_for(model_blocks()), identity(adapters, BASE))
    with pytest.raises(CardError, match=r"covers the full model, and none of its 6 blocks .* with the --lora or"):
        found.require(force=True)


def test_adapters_do_not_tell_where_a_model_comes_from() -> None:
    adapters = [block("layers.0.w.lora_A.default.weight", 2, 8), block("layers.0.w.lora_B.default.weight", 8, 2)]
    lora = TrainableSpec(mode="lora", settings={"rank": 2})
    card = card_for(adapters, trainable=lora)
    drawn_anew = [Block(b.name, torch.nn.Parameter(-b.parameter.detach())) for b in adapters]
    kinds = {
        hash_: match(card, identity(drawn_anew, hash_, lineage=lineage, trainable=lora)).kind
        for hash_, lineage in ((BASE, []), (OTHER, ["org/base"]), ("34" * 32, []))
    }
    assert list(kinds.values()) == ["same base", "declared", "stranger"]


def test_declared_by_name_or_hash() -> None:
    blocks = model_blocks()
    others = [Block(b.name, torch.nn.Parameter(-b.parameter.detach())) for b in blocks]
    assert matched(blocks, others).kind == "stranger"
    assert matched(blocks, others).correlation == pytest.approx(-1)
    for declared in ("org/base", BASE):
        found = matched(blocks, blocks, lineage=["org/between", declared])
        assert found.kind == "declared"
        assert (
            found.explanation == "declared derivative of org/base by the model card (sampled weights correlate 1.000)"
        )
    assert matched(blocks, blocks, lineage=["org/base-2"]).kind == "derivative"


@pytest.mark.parametrize("declared", [{"lineage": ["org/base"]}, {"lineage": [BASE]}, {"hub_id": "org/base"}])
def test_a_measured_correlation_overrules_what_is_declared(declared: dict) -> None:
    blocks = model_blocks()
    others = [Block(b.name, torch.nn.Parameter(-b.parameter.detach())) for b in blocks]
    found = matched(blocks, others, **declared)
    assert found.kind == "stranger" and found.explanation.endswith("whatever is declared")
    with pytest.raises(CardError, match=r"sampled weights correlate -1.000 .* \(--force uses it anyway\)"):
        found.require()


def test_samples_that_are_all_equal_do_not_evade_the_measurement() -> None:
    """Of a card that claims the base hash, and of one that is declared: nothing correlates with a constant."""
    blocks = model_blocks()
    card = card_for(blocks)
    flat = Card(card.metadata, {**card.tensors, "base.samples": torch.ones_like(card.tensors["base.samples"])})
    assert match(flat, identity(blocks, BASE)).kind == "incompatible"
    assert match(flat, identity(blocks, OTHER, lineage=["org/base"])).kind == "stranger"
    one = torch.ones_like(card.tensors["base.samples"])
    one[0] = card.tensors["base.samples"][0]  # true in one block alone
    assert match(Card(card.metadata, {**card.tensors, "base.samples": one}), identity(blocks)).kind == "stranger"


def test_without_samples_only_a_declaration_helps() -> None:
    blocks = model_blocks()
    assert match(card_for(blocks), ModelIdentity(OTHER, blocks)).kind == "stranger"
    assert match(card_for(blocks), ModelIdentity(OTHER, blocks, lineage=["org/base"])).kind == "declared"
    unknown = card_for(blocks)
    unhashed = unknown.metadata.base.model_copy(update={"hash": None})
    card = make_card(blocks, base=unhashed)
    assert match(card, identity(blocks)).correlation is None


# -- samples ------------------------------------------------------------------------------------------------------


def test_positions_are_those_of_the_format() -> None:
    """Fixed: other readers compute them, and cards in use depend on them."""
    assert sample_positions("model.embed_tokens.weight", 28311552) == POSITIONS
    assert set(sample_positions("a", 2)) == {0, 1}
    assert sample_positions("a", 1) == [0] * 16


def test_samples_are_the_weights_at_the_positions_whatever_the_strides() -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).t()
    (row,) = sample_weights([Block("w", torch.nn.Parameter(weight))])
    assert row.tolist() == [weight.contiguous().view(-1)[i].item() for i in sample_positions("w", 35)]


def test_correlation_is_the_mean_of_the_blocks_own() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 16, generator=generator), torch.randn(3, 16, generator=generator)
    expected = sum(torch.corrcoef(torch.stack([x, y]))[0, 1].item() for x, y in zip(a, b, strict=True)) / 3
    scale = torch.tensor([[1e-3], [1.0], [1e4]])
    assert correlation(a * scale, b * scale) == pytest.approx(expected, rel=1e-5)


def test_blocks_without_spread_do_not_count() -> None:
    varied = torch.arange(16.0)
    rows = torch.stack([varied, torch.ones(16)])
    assert correlation(rows, rows.flip(0)) is None
    assert correlation(rows, torch.stack([varied * 2 + 1, varied])) == pytest.approx(1)


# -- lineage ------------------------------------------------------------------------------------------------------


def write_card(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(text)
    return folder


def test_lineage_over_several_levels(tmp_path: Path, stories260k: Path) -> None:
    child = write_card(tmp_path / "child", "---\nbase_model: ../parent\n---\n")
    write_card(tmp_path / "parent", f"---\nbase_model:\n- {stories260k}\n- org/merged\n---\n")
    assert lineage(child) == ["../parent", str(stories260k), "org/merged", base_hash(stories260k)]


def test_lineage_ends_where_it_began(tmp_path: Path) -> None:
    one = write_card(tmp_path / "one", "---\nbase_model: ../two\n---\n")
    write_card(tmp_path / "two", "---\nbase_model: ../one\n---\n")
    assert lineage(one) == ["../two", "../one"]


@pytest.mark.parametrize(
    "text", ["no front matter", "---\nbase_model: [\n---\n", "---\n- 1\n---\n", "---\nx: 1\n---\n"]
)
def test_a_card_that_declares_nothing(tmp_path: Path, text: str) -> None:
    assert lineage(write_card(tmp_path / "m", text)) == []
    assert lineage(tmp_path / "absent") == []
