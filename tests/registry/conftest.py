"""Small cards to read, write and damage."""

import datetime
from collections.abc import Callable, Sequence

import pytest
import torch

from zoft.registry import (
    BaseFile,
    BaseSpec,
    BlockSpec,
    Card,
    EvidenceRow,
    LevelSpec,
    NetworkSpec,
    Recommended,
    TrainableSpec,
    TrainingSpec,
    TunerCard,
    pack,
    sample_weights,
    tensor_shapes,
)
from zoft.tuner.networks import PertNN, group_of
from zoft.weights.blocks import Block, architecture_hash, statistics, trainable_blocks


def levels(names: Sequence[str], *granularities: str) -> tuple[LevelSpec, ...]:
    return tuple(
        LevelSpec(granularity=g, groups=tuple(dict.fromkeys(group_of(name, g) for name in names)))
        for g in granularities
    )


def make_card(blocks: Sequence[Block], base_hash: str = "ab" * 32, **changes: object) -> Card:
    """A card for ``blocks`` whose tensors are simple fractions: the same bits on every machine."""
    names = [block.name for block in blocks]
    metadata = TunerCard(
        base=BaseSpec(
            id="org/base",
            hash=base_hash,
            architecture_hash=architecture_hash(blocks),
            files=(BaseFile(name="model.safetensors", size=1234, sha256="cd" * 32),),
        ),
        blocks=tuple(BlockSpec(name=block.name, shape=block.shape) for block in blocks),
        network=NetworkSpec(
            levels=levels(names, "kind", "block"), inputs="scaled", activation="exp", hidden=4, recurrent="s"
        ),
        training=TrainingSpec(config={"lr": 1e-6, "b": [1, None]}, tasks=("copa",), seeds=(0,), steps=3, forwards=6),
        evidence=(
            EvidenceRow(
                name="tuner", task="sst2", split="dev", lr=1e-5, eps=1e-3, forwards=40, seed=0, loss_start=1.0, loss=0.5
            ),
        ),
        verdict="the tuner wins: 0.5 < 0.6",
        recommended=Recommended(lr=1e-5, eps=1e-3),
        created=datetime.date(2026, 11, 23),
    ).model_copy(update=changes)
    return Card(metadata, fractions(metadata))


def working_card(
    model: torch.nn.Module, base_hash: str, net: PertNN | None = None, trainable: str = "full", **changes: object
) -> Card:
    """A card for ``model`` with the networks of ``net`` (default: untrained) and what is known of its weights."""
    blocks = trainable_blocks(model)
    spec, tensors = pack(net or PertNN([block.name for block in blocks], hidden=4))
    card = make_card(blocks, base_hash, network=spec, trainable=TrainableSpec(mode=trainable), **changes)
    measured = {"base.statistics": statistics(blocks).float(), "base.samples": sample_weights(blocks)}
    return Card(card.metadata, tensors | measured)


def disturbed(net: PertNN, std: float = 0.3, seed: int = 0) -> PertNN:
    """``net`` after a training of sorts: scales that differ by block and from step to step, exact in float16."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += std * torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data.half().float()
    return net


def fractions(metadata: TunerCard) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, shape in tensor_shapes(metadata).items():
        values = torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(7) / 8
        tensors[name] = values if name.startswith("base.") else values.half()
    return tensors


@pytest.fixture
def network() -> torch.nn.Module:
    """Two layers with a weight and a bias each, and a norm outside of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)])
        return torch.nn.ModuleDict({"layers": layers, "norm": torch.nn.LayerNorm(3, bias=False)})


@pytest.fixture
def card(network: torch.nn.Module) -> Card:
    return make_card(trainable_blocks(network))


@pytest.fixture
def cards() -> Callable[[int], Card]:
    """``cards(i)``: cards of equal size that differ in their base hash and date."""

    def make(i: int) -> Card:
        blocks = trainable_blocks(torch.nn.Linear(2, 2))
        return make_card(blocks, base_hash=f"{i % 3:064x}", created=datetime.date(2026, 1, 1 + i % 28))

    return make
