"""Batches: which examples a step sees, and their rows as left-padded tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from zoft.errors import DataError
from zoft.precision import HALF
from zoft.tasks.types import Encoded, Row


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the ``batch_size`` different examples of ``step`` (from 0), a function of ``seed`` and ``step`` alone.

    Every epoch is a new permutation; the ``size % batch_size`` examples at its end sit that epoch out.

    >>> sorted(batch_indices(4, 2, seed=0, step=0) + batch_indices(4, 2, seed=0, step=1))
    [0, 1, 2, 3]
    """
    if not 1 <= batch_size <= size:
        raise DataError(f"a batch of {batch_size} from {size} training rows; lower the batch size or give more rows")
    epoch, place = divmod(step, size // batch_size)
    return list(_permutation(size, seed, epoch)[place * batch_size : (place + 1) * batch_size])


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    # RandomState: its stream never changes between numpy versions.
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch))))
    return tuple(state.permutation(size).tolist())


def tokens_read(encoded: Sequence[Encoded]) -> Iterator[int]:
    """Yield the tokens that the training loss of a batch reads, each as often as it stands there."""
    return (token for one in encoded for row in one.loss_rows for token in row.ids)


@dataclass(frozen=True)
class PaddedRows:
    """Rows as left-padded tensors ``(rows, length)``, and the tokens they are scored on, flat ``(targets,)``.

    Target ``t`` is the token ``token[t]``, predicted by the logits at ``position[t]`` of row ``row[t]``; it counts
    as number ``place[t]`` towards choice ``segment[t]``, which has ``counts[segment[t]]`` targets.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    segment: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor
    logits_to_keep: int


@dataclass(frozen=True)
class Batch:
    """Padded rows and the structure of their choices.

    Choice ``c`` is choice ``column[c]`` of example ``example[c]``; ``gold[b]`` is the choice that example ``b`` is
    trained on. ``tokens`` counts what the model reads, padding left out.
    """

    rows: PaddedRows
    example: torch.Tensor
    column: torch.Tensor
    gold: torch.Tensor
    examples: int
    tokens: int


def length_step(dtype: torch.dtype) -> int:
    """Return what the padded length of a batch is a multiple of: 8 in half precision.

    There a CPU compiles its kernels for every length and keeps them (3 MB for each of a model with 135 M weights), and
    a GPU is fastest at multiples of 8. In float32 padding only costs time.
    """
    return 8 if dtype in HALF else 1


def collate(encoded: Sequence[Encoded], pad_id: int, device: torch.device | str, step: int = 1) -> Batch:
    """Return the batch that the training loss reads: every choice, or only the gold one where the rest do not count.

    Its rows are padded to a multiple of ``step`` (`length_step`).
    """
    rows = [row for one in encoded for row in one.loss_rows]
    choices = [(b, target.choice) for b, one in enumerate(encoded) for row in one.loss_rows for target in row.targets]
    gold = [choices.index((b, one.label)) for b, one in enumerate(encoded)]
    return Batch(
        rows=pad(rows, pad_id, device, step),
        example=torch.tensor([b for b, _ in choices], device=device),
        column=torch.tensor([choice for _, choice in choices], device=device),
        gold=torch.tensor(gold, device=device),
        examples=len(encoded),
        tokens=sum(len(row.ids) for row in rows),
    )


def pad(rows: Sequence[Row], pad_id: int, device: torch.device | str, step: int = 1) -> PaddedRows:
    """Return ``rows`` padded on the left, with explicit positions; choices are numbered in order of appearance.

    The length is the smallest multiple of ``step`` that holds all of them.
    """
    length = -(-max(len(row.ids) for row in rows) // step) * step
    gaps = [length - len(row.ids) for row in rows]
    targets = [(i, target) for i, row in enumerate(rows) for target in row.targets]
    mask = torch.tensor([[0] * gap + [1] * len(row.ids) for gap, row in zip(gaps, rows, strict=True)])
    position = [gaps[i] + place for i, target in targets for place in target.positions]
    return PaddedRows(
        input_ids=torch.tensor(
            [[pad_id] * gap + list(row.ids) for gap, row in zip(gaps, rows, strict=True)], device=device
        ),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        row=torch.tensor([i for i, target in targets for _ in target.tokens], device=device),
        position=torch.tensor(position, device=device),
        token=torch.tensor([token for _, target in targets for token in target.tokens], device=device),
        segment=torch.tensor([c for c, (_, target) in enumerate(targets) for _ in target.tokens], device=device),
        place=torch.tensor([k for _, target in targets for k in range(len(target.tokens))], device=device),
        counts=torch.tensor([len(target.tokens) for _, target in targets], device=device),
        logits_to_keep=length - min(position, default=length - 1),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up rows: the tokenizer's own, else its end token, else 0 (it is masked anyway)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
