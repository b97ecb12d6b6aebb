"""PertNN: small networks that predict the perturbation scale of each parameter block (arXiv 2510.00419).

All networks are one batched module: a step evaluates them in a handful of kernels, whatever the number of blocks. A
network may serve one block, all blocks of a layer, or all blocks of a kind (``v_proj`` of every layer); the outputs of
several such levels are added before the activation, which is partial pooling: the scale of the kind, plus a residual
of the block.

There are two forms. The default has inputs of order one and a last layer that starts at zero, so that ``sigma = exp(0)
= 1`` for every block: an untrained tuner is MeZO. The form `paper` is the published one: raw inputs, PyTorch's
initialisation, ``|MLP|``, one network for each block.
"""

import re
from collections.abc import Sequence
from typing import Literal

import torch

from zoft.tuner.features import INPUTS, Inputs, Recurrent, inputs_raw, inputs_scaled

Granularity = Literal["block", "layer", "kind"]
Activation = Literal["exp", "abs"]
RecurrentScale = Literal["s", "sigma"]
EffectiveSize = Literal["full", "touched_rows", "none"]
_LAYER = re.compile(r"^(.*?\.\d+)\.")


def group_of(name: str, granularity: Granularity) -> str:
    """Return the group that the block called ``name`` belongs to.

    >>> [group_of("model.layers.3.self_attn.v_proj.weight", g) for g in ("block", "layer", "kind")]
    ['model.layers.3.self_attn.v_proj.weight', 'model.layers.3', 'model.layers.*.self_attn.v_proj.weight']
    >>> group_of("model.norm.weight", "layer")
    'model.norm.weight'
    """
    if granularity == "kind":
        return re.sub(r"\.\d+(?=\.)", ".*", name)
    match = _LAYER.match(name) if granularity == "layer" else None
    return match[1] if match else name


class Level(torch.nn.Module):
    """The networks ``5 -> hidden -> tanh -> 1`` of all groups at one granularity, stacked.

    ``w1`` is ``(groups, hidden, 5)``, ``b1`` and ``w2`` ``(groups, hidden)``, ``b2`` ``(groups,)``; ``index`` ``(n,)``
    is the group of each block.
    """

    index: torch.Tensor

    def __init__(self, granularity: Granularity, names: Sequence[str], hidden: int) -> None:
        super().__init__()
        self.granularity = granularity
        of_block = [group_of(name, granularity) for name in names]
        self.groups = list(dict.fromkeys(of_block))
        position = {group: i for i, group in enumerate(self.groups)}
        self.register_buffer("index", torch.tensor([position[group] for group in of_block]), persistent=False)
        count = len(self.groups)
        self.w1 = torch.nn.Parameter(torch.zeros(count, hidden, INPUTS))
        self.b1 = torch.nn.Parameter(torch.zeros(count, hidden))
        self.w2 = torch.nn.Parameter(torch.zeros(count, hidden))
        self.b2 = torch.nn.Parameter(torch.zeros(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of each block's network on its inputs ``x``, ``(n, 5)``: ``(n,)``."""
        hidden = torch.tanh((self.w1[self.index] * x[:, None, :]).sum(-1) + self.b1[self.index])
        return (self.w2[self.index] * hidden).sum(-1) + self.b2[self.index]

    @torch.no_grad()
    def initialise_(self, generator: torch.Generator, *, last_layer: bool) -> None:
        """Draw PyTorch's default uniform initialisation; the last layer stays zero unless ``last_layer``."""
        bounds = {"w1": INPUTS**-0.5, "b1": INPUTS**-0.5}
        if last_layer:
            bounds |= {"w2": self.w2.shape[1] ** -0.5, "b2": self.w2.shape[1] ** -0.5}
        for name, bound in bounds.items():
            getattr(self, name).uniform_(-bound, bound, generator=generator)


class PertNN(torch.nn.Module):
    """The perturbation networks of a model's blocks: inputs to raw scales ``sigma``.

    Args:
        names: names of the blocks, in order.
        levels: granularities whose outputs are added; the default pools over kinds and lets each block deviate.
        inputs: ``"scaled"``, or ``"raw"`` as published.
        activation: ``"exp"``, or ``"abs"`` as published.
        hidden: width of the hidden layer.
        strength: exponent between MeZO (0) and the full tuner (1): ``sigma ** strength``.
        recurrent: the scale that a step passes to the next, normalised ``"s"`` or raw ``"sigma"`` as published.
        effective_size: sizes in the normalisation, of whole blocks or `touched_sizes`; ``"none"`` switches it off, an
            ablation of the paper.
        seed: of the initialisation.

    >>> net = PertNN(["layers.0.v.weight", "layers.1.v.weight"])
    >>> net(torch.tensor([[0.0, 0.01], [0.1, 0.02]], dtype=torch.float64), Recurrent.start(2)).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        levels: Sequence[Granularity] = ("kind", "block"),
        inputs: Inputs = "scaled",
        activation: Activation = "exp",
        hidden: int = 64,
        strength: float = 1.0,
        recurrent: RecurrentScale = "s",
        effective_size: EffectiveSize = "full",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.names = list(names)
        self.inputs, self.activation, self.hidden, self.strength = inputs, activation, hidden, strength
        self.recurrent, self.effective_size = recurrent, effective_size
        self.levels = torch.nn.ModuleList(Level(granularity, names, hidden) for granularity in levels)
        generator = torch.Generator().manual_seed(seed)
        for level in self.levels:
            level.initialise_(generator, last_layer=activation == "abs")  # type: ignore[operator]

    @classmethod
    def paper(cls, names: Sequence[str], seed: int = 0) -> "PertNN":
        """Return the published form: one network for each block, raw inputs, ``|MLP|``, PyTorch's initialisation."""
        return cls(names, levels=("block",), inputs="raw", activation="abs", recurrent="sigma", seed=seed)

    @classmethod
    def fixed(cls, names: Sequence[str], sigma: torch.Tensor) -> "PertNN":
        """Return networks that give block ``i`` the constant ``sigma[i] > 0``, whatever their inputs.

        >>> net = PertNN.fixed(["a", "b"], torch.tensor([0.5, 2.0]))
        >>> [round(value, 6) for value in net(torch.ones(2, 2), Recurrent.start(2)).tolist()]
        [0.5, 2.0]
        """
        net = cls(names, levels=("block",), hidden=1)
        with torch.no_grad():
            net.levels[0].b2.copy_(sigma.log())  # type: ignore[operator]
        return net

    def forward(self, statistics: torch.Tensor, before: Recurrent) -> torch.Tensor:
        """Return ``sigma``, ``(n,)``, from the blocks' mean and variance, ``(n, 2)`` float64, and the step before.

        The inputs are constants: gradients flow into the networks only (arXiv 2510.00419; methods 5.2 and 5.3).
        """
        x = (inputs_raw if self.inputs == "raw" else inputs_scaled)(statistics, before).detach()
        x = x.to(next(self.parameters()).dtype)
        outputs = torch.stack([level(x) for level in self.levels]).sum(0)
        if self.activation == "exp":
            return torch.exp(self.strength * outputs)
        return outputs.abs() ** self.strength
