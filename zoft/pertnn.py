"""PertNN: the tiny networks that say how hard to shake each block (ZO Fine-tuner, arXiv 2510.00419).

All networks are one batched module: a step evaluates them in a handful of kernels, whatever the number of blocks. A
network may serve one block, all blocks of a layer, or all blocks of a kind (``v_proj`` of every layer); the outputs of
several such levels are added before the activation, which is partial pooling: what the kind has learned, plus a
residual of the block.

Two forms. The default reads inputs on scales that a network can tell apart and starts with a zero last layer, so that
``sigma = exp(0) = 1`` for every block: an untrained tuner is MeZO. The form `paper` is the published one: raw inputs,
PyTorch's initialisation, ``|MLP|``, one network a block.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from zoft.blocks import Block

Granularity = Literal["block", "layer", "kind"]
Inputs = Literal["scaled", "raw"]
Activation = Literal["exp", "abs"]
Handed = Literal["s", "sigma"]
EffectiveSize = Literal["full", "touched_rows", "none"]

INPUTS = 5
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


@dataclass(frozen=True)
class Recurrent:
    """What a step hands to the next: its mean losses ``L+`` and ``L-``, and the scale of every block, ``(n,)``.

    The scale is ``s``, or the raw ``sigma`` in the form `paper`. At the start the losses are 0 and the scales 1.
    """

    loss_pos: float
    loss_neg: float
    scales: torch.Tensor

    @classmethod
    def start(cls, blocks: int) -> "Recurrent":
        """The state before the first step, and after a reset."""
        return cls(0.0, 0.0, torch.ones(blocks, dtype=torch.float64))


def inputs_raw(statistics: torch.Tensor, before: Recurrent) -> torch.Tensor:
    """Return the inputs of the published code, ``(n, 5)`` float32: mean, variance, both losses, previous scale."""
    losses = statistics.new_tensor([before.loss_pos, before.loss_neg]).expand(len(statistics), 2)
    return torch.cat([statistics, losses, before.scales[:, None]], dim=1).float()


def inputs_scaled(statistics: torch.Tensor, before: Recurrent) -> torch.Tensor:
    """Return the same five facts on scales of order one, ``(n, 5)`` float32.

    Mean over root mean square; decades of the variance (from 1e-4 to 1 they go from 0 to 1); the mean of the two losses
    and their difference, which the raw inputs hide in each other's last digits; the logarithm of the previous scale.
    """
    mean, variance = statistics.unbind(1)
    loss = statistics.new_tensor((before.loss_pos + before.loss_neg) / 2).asinh()
    difference = statistics.new_tensor(100 * (before.loss_pos - before.loss_neg)).asinh()
    columns = [
        mean / (variance + mean.square() + 1e-12).sqrt(),
        1 + (variance + 1e-12).log10() / 4,
        loss.expand_as(mean),
        difference.expand_as(mean),
        before.scales.clamp(min=1e-6).log(),
    ]
    return torch.stack(columns, dim=1).float()


def normaliser(sigma: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
    """Return ``k = sqrt(sum m_i / sum m_i sigma_i^2)`` in float64: see `normalise`. Without sizes it is 1."""
    if sizes is None:
        return torch.ones((), dtype=torch.float64)
    sigma, sizes = sigma.double(), sizes.double()
    return (sizes.sum() / (sizes * sigma.square()).sum()).sqrt()


def normalise(sigma: torch.Tensor, sizes: torch.Tensor | None, *, detach: bool = False) -> torch.Tensor:
    """Return ``s = k sigma`` in float64, with ``k`` so that ``sum m_i s_i^2 = sum m_i``.

    Args:
        sigma: raw scales, ``(n,)``.
        sizes: effective sizes ``m_i`` of the blocks, ``(n,)``: their numbers of weights, or another weighting. None
            leaves the scales as they are.
        detach: take ``k`` as a constant in the gradient, as the published code does.

    >>> normalise(torch.tensor([2.0, 2.0]), torch.tensor([10.0, 30.0])).tolist()
    [1.0, 1.0]
    """
    k = normaliser(sigma, sizes)
    return (k.detach() if detach else k) * sigma.double()


def full_sizes(blocks: Sequence[Block]) -> torch.Tensor:
    """Return the numbers of weights ``d_i`` of the blocks, ``(n,)`` float64."""
    return torch.tensor([block.size for block in blocks], dtype=torch.float64)


def touched_sizes(blocks: Sequence[Block], embedding: str | None, rows: Iterable[int]) -> torch.Tensor:
    """Return effective sizes ``(n,)``: the block called ``embedding`` counts by its distinct ``rows`` only.

    The loss of a batch does not feel the other rows (the published code assumes 15 rows an example; arXiv 2510.00419).
    ``embedding`` is None where all rows matter: see `untied_embedding`.

    >>> table = Block("embed", torch.nn.Parameter(torch.ones(100, 4)))
    >>> touched_sizes([table], "embed", [7, 7, 9]).tolist()
    [8.0]
    """
    touched = len(set(rows))
    sizes = [touched * block.shape[1] if block.name == embedding else block.size for block in blocks]
    return torch.tensor(sizes, dtype=torch.float64)


def effective_sizes(
    tuner: "PertNN", model: torch.nn.Module, blocks: Sequence[Block], tokens: Iterable[int]
) -> torch.Tensor | None:
    """Return the sizes by which `normaliser` counts the ``blocks`` of ``model`` for ``tuner``, ``(n,)``.

    ``tokens`` are those that the training loss of the coming step reads. None for a tuner that is not normalised.
    """
    if tuner.effective_size == "none":
        return None
    if tuner.effective_size == "full":
        return full_sizes(blocks)
    return touched_sizes(blocks, untied_embedding(model, blocks), tokens)


def untied_embedding(model: torch.nn.Module, blocks: Sequence[Block]) -> str | None:
    """Return the name of the block that is the input embedding of a transformers model; None if the head is tied to it.

    Every row of a tied embedding is read as a row of the head, whatever the tokens of a batch.
    """
    embedding, head = (getattr(model, f"get_{side}_embeddings")() for side in ("input", "output"))
    if embedding is None or (head is not None and head.weight is embedding.weight):
        return None
    return next((block.name for block in blocks if block.parameter is embedding.weight), None)


class Level(torch.nn.Module):
    """The networks ``5 -> hidden -> tanh -> 1`` of all groups at one granularity, stacked.

    ``w1`` is ``(groups, hidden, 5)``, ``b1`` and ``w2`` ``(groups, hidden)``, ``b2`` ``(groups,)``; ``index`` ``(n,)``
    says which group each block belongs to.
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
        recurrent: which scale of a step is an input of the next, normalised ``"s"`` or raw ``"sigma"`` as published.
        effective_size: sizes in the normalisation, of whole blocks or `touched_sizes`; ``"none"`` leaves it out, which
            is an ablation of the paper.
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
        recurrent: Handed = "s",
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
        """The published form: one network a block, raw inputs, ``|MLP|``, PyTorch's initialisation."""
        return cls(names, levels=("block",), inputs="raw", activation="abs", recurrent="sigma", seed=seed)

    @classmethod
    def fixed(cls, names: Sequence[str], sigma: torch.Tensor) -> "PertNN":
        """Networks that give block ``i`` the constant ``sigma[i] > 0``, whatever their inputs.

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
