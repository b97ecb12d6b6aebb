"""LeZO: every step perturbs and updates a random subset of the layers (arXiv 2410.09823)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pydantic import Field

from zoft.errors import ModelError
from zoft.noise.direction import Direction
from zoft.optim.core.method import Method
from zoft.optim.core.parts import Directions, Host
from zoft.optim.core.record import Step
from zoft.weights.blocks import layer_of, layers_of


class Layers(Directions):
    """``u = z`` on the layers of a step, 0 on the others, which are read as they stand and not updated. No state.

    The layers are drawn anew in every step, ``keep`` of them and at least one; blocks outside of layers (embedding,
    final norm, head) always take part. With ``keep = 1`` it is MeZO bit for bit.

    >>> sorted(Layers(keep=0.5).chosen(["0", "1", "2", "3"], seed=0, step=7))
    ['0', '3']
    """

    keep: float = Field(0.25, gt=0, le=1, description="share of the layers that a step perturbs and updates")

    def check(self, host: Host) -> None:
        """Raise `ModelError` if the blocks have no numbered layers."""
        if not layers_of(host.blocks):
            raise ModelError(
                f"lezo draws layers, and no block has a layer number in its name (such as {host.blocks[0].name!r}); "
                "try mezo, or sparse-mezo"
            )

    def chosen(self, layers: Sequence[str], seed: int, step: int) -> set[str]:
        """Return the layers of a step: those with the smallest keys, a function of (seed, step, layer)."""
        count = max(1, round(self.keep * len(layers)))
        keys = {layer: hashlib.sha256(f"{seed}/{step}/layer/{layer}".encode()).digest() for layer in layers}
        return set(sorted(layers, key=lambda layer: keys[layer])[:count])

    def direction(self, host: Host, step: Step, probe: int) -> Direction:
        """Return the direction of one probe; all probes of a step have the same layers."""
        chosen = self.chosen(layers_of(host.blocks), step.seed, step.step)
        left_out = {block.name: 0.0 for block in host.blocks if layer_of(block.name) not in chosen | {None}}
        return host.isotropic(step, probe, host.named_scales(step) | left_out)


METHOD = Method(
    "lezo",
    "MeZO on a random subset of the layers",
    "arXiv 2410.09823",
    parts=(Layers,),
)
