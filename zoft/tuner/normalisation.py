"""Normalise the raw scales of blocks, so that a learning rate means the same as for MeZO."""

from collections.abc import Iterable, Sequence

import torch

from zoft.tuner.networks import PertNN
from zoft.weights.blocks import Block


def normaliser(sigma: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
    """Return ``k = sqrt(sum m_i / sum m_i sigma_i^2)`` in float64: see `normalise`; 1 without sizes."""
    if sizes is None:
        return torch.ones((), dtype=torch.float64)
    sigma, sizes = sigma.double(), sizes.double()
    return (sizes.sum() / (sizes * sigma.square()).sum()).sqrt()


def normalise(sigma: torch.Tensor, sizes: torch.Tensor | None, *, detach: bool = False) -> torch.Tensor:
    """Return ``s = k sigma`` in float64, with ``k`` so that ``sum m_i s_i^2 = sum m_i``.

    Args:
        sigma: raw scales, ``(n,)``.
        sizes: effective sizes ``m_i`` of the blocks, ``(n,)``: their numbers of weights, or another weighting. None
            leaves the scales unchanged.
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

    The loss of a batch does not depend on the other rows (the published code assumes 15 rows an example; arXiv
    2510.00419). ``embedding`` is None if all rows matter: see `untied_embedding`.

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
    """Return the sizes of the ``blocks`` in the normaliser of ``tuner``, ``(n,)``; None if it is not normalised.

    ``tokens`` are those that the training loss of the coming step reads.
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
