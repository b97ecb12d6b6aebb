"""LeZO: every step perturbs and updates a random subset of the layers (arXiv 2410.09823)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from zoft.errors import ModelError
from zoft.noise.direction import Direction
from zoft.optim.core.parts import Directions
from zoft.optim.core.record import StepRecord
from zoft.weights.blocks import Block

if TYPE_CHECKING:
    from zoft.optim.core.optimizer import ZOOptimizer

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class Layers(Directions):
    """``u = z`` on the layers of a step, 0 on the others, which are read as they stand and not updated. No state.

    The layers are drawn anew in every step, ``keep`` of them and at least one; blocks outside of layers (embedding,
    final norm, head) always take part. With ``keep = 1`` it is MeZO bit for bit.

    >>> sorted(Layers(keep=0.5).chosen(["0", "1", "2", "3"], seed=0, step=7))
    ['0', '3']
    """

    keep: float = Field(0.25, gt=0, le=1, description="share of the layers that a step perturbs and updates")

    def check(self, blocks: Sequence[Block]) -> None:
        """Raise `ModelError` if the blocks have no numbered layers."""
        if not layers_of(blocks):
            raise ModelError(
                f"lezo draws layers, and no block has a layer number in its name (such as {blocks[0].name!r}); "
                "try mezo, or sparse-mezo"
            )

    def chosen(self, layers: Sequence[str], seed: int, step: int) -> set[str]:
        """Return the layers of a step: those with the smallest keys, a function of (seed, step, layer)."""
        count = max(1, round(self.keep * len(layers)))
        keys = {layer: hashlib.sha256(f"{seed}/{step}/layer/{layer}".encode()).digest() for layer in layers}
        return set(sorted(layers, key=lambda layer: keys[layer])[:count])

    def direction(self, optimizer: ZOOptimizer, record: StepRecord, probe: int) -> Direction:
        """Return the direction of one probe; all probes of a step have the same layers."""
        chosen = self.chosen(layers_of(optimizer.blocks), record.seed, record.step)
        left_out = {block.name: 0.0 for block in optimizer.blocks if layer_of(block.name) not in chosen | {None}}
        return optimizer.isotropic(record, probe, optimizer.named_scales(record) | left_out)


def layer_of(name: str) -> str | None:
    """Return the layer of the block called ``name``, the first number in it; None outside of layers.

    >>> layer_of("model.layers.3.mlp.weight"), layer_of("norm.weight")
    ('3', None)
    """
    match = _LAYER.search(name)
    return match[1] if match else None


def layers_of(blocks: Sequence[Block]) -> list[str]:
    """Return the layers of ``blocks`` in their order."""
    return list(dict.fromkeys(layer for block in blocks if (layer := layer_of(block.name)) is not None))
