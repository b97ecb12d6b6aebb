"""Batches: which examples a step sees, and their rows laid out as tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from zoft.errors import DataError
from zoft.memory import send_arrays
from zoft.model.architecture import vocabulary
from zoft.tasks.packing import Tree, fill, join, readable
from zoft.tasks.types import Encoded, Row
from zoft.weights.dtypes import HALF


def batch_indices(size: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the ``batch_size`` different examples of ``step`` (from 0), a function of ``seed`` and ``step`` alone.

    Every epoch is a new permutation; the ``size % batch_size`` examples at its end are not used in that epoch.

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
    """Yield the tokens that the training loss of a batch reads, repeated ones as often as they occur."""
    return (token for one in encoded for row in one.loss_rows for token in row.ids)


def tokens_scored(encoded: Sequence[Encoded]) -> Iterator[int]:
    """Yield the tokens of all choices that the training loss of ``encoded`` scores, as often as they occur."""
    rows = (row for one in encoded for row in one.loss_rows)
    return (token for row in rows for target in row.targets for token in target.tokens)


@dataclass(frozen=True)
class PaddedRows:
    """Rows as tensors ``(rows, length)``, and the tokens they are scored on, flat ``(targets,)``.

    ``attention_mask`` is ``(rows, length)`` of rows padded on the left, one to each; ``(rows, 1, length, length)``,
    true where the token of the third dimension reads that of the fourth, of packed rows (`zoft.tasks.packing`).

    The needed logits, each once, are those at ``logit_position`` of row ``logit_row``, both ``(logits,)``. Target ``t``
    is the token ``token[t]``, predicted by logits ``logit[t]``; it is target ``place[t]`` of choice ``segment[t]``,
    which has ``counts[segment[t]]`` targets, at most ``most``. No row needs logits before ``first_position``.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    logit_row: torch.Tensor
    logit_position: torch.Tensor
    logit: torch.Tensor
    token: torch.Tensor
    segment: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor
    most: int
    first_position: int


@dataclass(frozen=True)
class Batch:
    """Batch: rows as a model reads them, and the structure of their choices.

    Choice ``c`` is choice ``column[c]`` of example ``example[c]``; ``gold[b]`` is the choice that example ``b`` is
    trained on. ``columns`` is the largest number of choices of an example, ``gold_tokens`` the number of targets
    of all gold choices, ``tokens`` the number of tokens read, without padding.
    """

    rows: PaddedRows
    example: torch.Tensor
    column: torch.Tensor
    gold: torch.Tensor
    examples: int
    columns: int
    gold_tokens: int
    tokens: int


@dataclass(frozen=True)
class HostBatch:
    """A batch in host memory: int64 ``arrays`` by the names that `PaddedRows` and `Batch` give them.

    Numbers that decide the shape of a tensor are kept here: reading them from a GPU would wait for it.
    """

    arrays: Mapping[str, np.ndarray]
    packed: bool
    most: int
    first_position: int
    examples: int = 0
    columns: int = 0
    tokens: int = 0

    @property
    def gold_tokens(self) -> int:
        """Targets of the choices that are trained on."""
        return int(self.arrays["counts"][self.arrays["gold"]].sum())

    def rows(self, tensors: Mapping[str, torch.Tensor]) -> PaddedRows:
        """Return the rows, given the arrays as ``tensors`` on some device."""
        own = ("input_ids", "position_ids", "logit_row", "logit_position", "logit", "token", "segment", "place")
        owner, branch = tensors["owner"], tensors["branch"]
        return PaddedRows(
            **{name: tensors[name] for name in (*own, "counts")},
            attention_mask=readable(owner, branch) if self.packed else (owner >= 0).long(),
            most=self.most,
            first_position=self.first_position,
        )

    def batch(self, tensors: Mapping[str, torch.Tensor]) -> Batch:
        """Return the batch, given the arrays as ``tensors`` on some device."""
        return Batch(
            rows=self.rows(tensors),
            example=tensors["example"],
            column=tensors["column"],
            gold=tensors["gold"],
            examples=self.examples,
            columns=self.columns,
            gold_tokens=self.gold_tokens,
            tokens=self.tokens,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``; the host does not wait for the copy."""
        return self.batch(send_arrays(self.arrays, device))


def length_step(dtype: torch.dtype) -> int:
    """Return the number that the padded length of a batch is a multiple of: 8 in half precision, else 1.

    In half precision a CPU compiles and keeps kernels for every length (3 MB per length for a model of 135 M weights),
    and a GPU is fastest at multiples of 8. In float32 padding only costs time.
    """
    return 8 if dtype in HALF else 1


def collate(
    encoded: Sequence[Encoded], pad_id: int, device: torch.device | str, step: int = 1, packable: int = 0
) -> Batch:
    """Return the batch that the training loss reads, on ``device``: see `host_batch`."""
    return host_batch(encoded, pad_id, step, packable).to(device)


def host_batch(encoded: Sequence[Encoded], pad_id: int, step: int = 1, packable: int = 0) -> HostBatch:
    """Return the batch that the training loss reads: every choice, or only the gold one where the loss ignores others.

    The length of its rows is a multiple of ``step`` (`length_step`). They are packed where none is longer than
    ``packable`` (`zoft.tasks.packing.packable`), else padded, one for each row of an example.
    """
    choices = [(b, target.choice) for b, one in enumerate(encoded) for row in one.loss_rows for target in row.targets]
    gold = [choices.index((b, one.label)) for b, one in enumerate(encoded)]
    packed = all(fits(one.loss_rows, packable) for one in encoded)
    trees = [tree for one in encoded for tree in trees_of(one.loss_rows, packed)]
    arrays = _rows(trees, pad_id, step, packed) | {
        "example": _integers(b for b, _ in choices),
        "column": _integers(choice for _, choice in choices),
        "gold": _integers(gold),
    }
    columns, tokens = 1 + max(choice for _, choice in choices), sum(len(tree.ids) for tree in trees)
    return HostBatch(arrays, packed, *_sizes(arrays), len(encoded), columns, tokens)


def fits(rows: Sequence[Row], packable: int) -> bool:
    """Whether ``rows`` are short enough to be packed."""
    return max(len(row.ids) for row in rows) <= packable


def trees_of(rows: Sequence[Row], packed: bool) -> list[Tree]:
    """Return the rows of an example as trees: joined behind what they share, or each as it is."""
    return join(rows) if packed else [Tree.of(row) for row in rows]


def pad(rows: Sequence[Row], pad_id: int, device: torch.device | str, step: int = 1) -> PaddedRows:
    """Return ``rows`` padded on the left to a multiple of ``step``; choices are numbered in their order."""
    return arrange([Tree.of(row) for row in rows], pad_id, device, step, packed=False)


def arrange(
    trees: Sequence[Tree], pad_id: int, device: torch.device | str, step: int = 1, packed: bool = True
) -> PaddedRows:
    """Return ``trees`` as tensors: packed into few rows, or (trees of one row only) each padded on the left.

    The length is the smallest multiple of ``step`` that holds all of them; choices are numbered in their order.
    """
    arrays = _rows(trees, pad_id, step, packed)
    return HostBatch(arrays, packed, *_sizes(arrays)).rows(send_arrays(arrays, device))


def _sizes(arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Return the most targets of a choice, and the first position whose logits are needed."""
    return int(arrays["counts"].max(initial=0)), int(arrays["logit_position"].min()) if arrays["logit"].size else 0


def _rows(trees: Sequence[Tree], pad_id: int, step: int, packed: bool) -> dict[str, np.ndarray]:
    """The arrays of `arrange`; ``owner`` and ``branch`` are each token's tree (-1 for padding) and branch in it."""
    sizes = [len(tree.ids) for tree in trees]
    places = fill(sizes) if packed else [(i, max(sizes) - size) for i, size in enumerate(sizes)]
    used = max(start + size for (_, start), size in zip(places, sizes, strict=True))
    length = -(-used // step) * step
    if not packed:
        places = [(i, start + length - used) for i, start in places]
    shape = (max(row for row, _ in places) + 1, length)
    ids, positions, owner, branch = (np.full(shape, value, np.int64) for value in (pad_id, 0, -1, 0))
    for i, (tree, (row, start)) in enumerate(zip(trees, places, strict=True)):
        here = slice(start, start + len(tree.ids))
        ids[row, here], positions[row, here], owner[row, here], branch[row, here] = (
            *(tree.ids, tree.positions),
            *(i, tree.branches),
        )
    targets = [(place, target) for place, tree in zip(places, trees, strict=True) for target in tree.targets]
    predicted = [(row, start + position) for (row, start), target in targets for position in target.positions]
    logits = {where: i for i, where in enumerate(dict.fromkeys(predicted))}
    # As with lengths: the head's kernels are compiled for every number of rows. Logits added here are not read.
    needed = [*logits, *predicted[-1:] * (-len(logits) % step)]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "owner": owner,
        "branch": branch,
        "logit_row": _integers(row for row, _ in needed),
        "logit_position": _integers(position for _, position in needed),
        "logit": _integers(logits[where] for where in predicted),
        "token": _integers(token for _, target in targets for token in target.tokens),
        "segment": _integers(c for c, (_, target) in enumerate(targets) for _ in target.tokens),
        "place": _integers(k for _, target in targets for k in range(len(target.tokens))),
        "counts": _integers(len(target.tokens) for _, target in targets),
    }


def _integers(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding token: the tokenizer's own, else its end token, else 0 (it is masked anyway)."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def readable_filler(filler: int, model: torch.nn.Module) -> int:
    """Return ``filler``, or 0 if the embedding of ``model`` has no row for it, as for a ``[PAD]`` that was added."""
    return filler if filler < vocabulary(model) else 0
