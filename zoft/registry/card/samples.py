"""Sampled weights: sixteen of every block at fixed positions, enough to tell a derivative from a stranger."""

import hashlib
from collections.abc import Sequence

import torch

from zoft.registry.card.file import SAMPLES
from zoft.weights.blocks import Block


def sample_positions(name: str, size: int) -> list[int]:
    """Return 16 positions in the row-major order of the block ``name`` of ``size`` weights; small blocks repeat some.

    Position k is the first 8 bytes of SHA-256(``"name/k"``), little-endian, modulo ``size``: part of card format 1.

    >>> sample_positions("model.norm.weight", 64)[:4]
    [51, 46, 40, 57]
    """
    digests = (hashlib.sha256(f"{name}/{k}".encode()).digest() for k in range(SAMPLES))
    return [int.from_bytes(digest[:8], "little") % size for digest in digests]


def sample_weights(blocks: Sequence[Block]) -> torch.Tensor:
    """Return ``(n, 16)`` float32 weights of the ``blocks`` on the CPU: a card's ``base.samples``."""
    rows = []
    for block in blocks:
        positions = torch.tensor(sample_positions(block.name, block.size), device=block.parameter.device)
        rows.append(block.parameter.detach().take(positions).float())
    return torch.stack(rows).cpu()
