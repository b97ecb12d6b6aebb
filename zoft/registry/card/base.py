"""Base: what a card stores about its base model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zoft.model import fingerprint
from zoft.model.adapters import adapter_of
from zoft.model.checkpoint import weight_files
from zoft.model.load import Loaded
from zoft.registry.card.samples import sample_weights
from zoft.registry.card.schema import ALL_WEIGHTS, BaseFile, BaseSpec, BlockSpec, TrainableSpec
from zoft.weights.blocks import Block, architecture_hash, statistics


@dataclass(frozen=True)
class Base:
    """The facts of a base in its card; ``tensors`` are ``base.statistics`` and ``base.samples``, none without weights.

    With an adapter, blocks and tensors are those of the adapter at its start, and ``trainable`` describes it.
    """

    spec: BaseSpec
    blocks: tuple[BlockSpec, ...]
    tensors: dict[str, torch.Tensor]
    trainable: TrainableSpec = ALL_WEIGHTS

    @classmethod
    def of(cls, loaded: Loaded, blocks: Sequence[Block]) -> "Base":
        """Describe a model as it was loaded."""
        found = fingerprint.describe_files(weight_files(loaded.path))
        adapter = adapter_of(loaded.model)
        spec = BaseSpec(
            id=base_name(loaded.base),
            hash=fingerprint.base_hash(loaded.path),
            architecture_hash=architecture_hash(blocks)
            if adapter is None
            else fingerprint.architecture_of(loaded.path),
            files=tuple(BaseFile(name=file.name, size=file.size, sha256=file.sha256) for file in found),
            source_note="converted from a GGUF file" if loaded.base.endswith(".gguf") else "",
        )
        measured = {"base.statistics": statistics(blocks).float(), "base.samples": sample_weights(blocks)}
        return cls(spec, block_specs(blocks), measured, TrainableSpec.of(adapter))


def block_specs(blocks: Sequence[Block]) -> tuple[BlockSpec, ...]:
    """Return the names and shapes of ``blocks``."""
    return tuple(BlockSpec(name=block.name, shape=block.shape) for block in blocks)


def base_name(source: str) -> str:
    """Return the name of a model in its card: a Hub id unchanged, of a path only the last part."""
    is_hub_id = source.count("/") <= 1 and not source.startswith((".", "/", "~"))
    return source if is_hub_id else source.rstrip("/").rsplit("/", 1)[-1]
