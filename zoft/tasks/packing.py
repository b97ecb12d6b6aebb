"""Packing: rows that share prompts and hold several examples, for models that take a 4-D attention mask.

The choices of an example follow one copy of their prompt, each attending to the prompt and to itself (a token tree, as
in speculative decoding: arXiv 2305.09781); several examples share a row, each attending only to itself. Positions are
those of a plain row. The model computes for a token what it computes in a plain row, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch

from zoft.model.architecture import unwrapped
from zoft.tasks.types import Row, Target

# Architectures that use a given 4-D attention mask and given positions; tests compare each with plain rows. Excluded:
# those with a recurrent state along the row (Mamba and similar), with ALiBi, or that build their own mask.
PACKING = {
    *("arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neox", "granite", "helium", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2"),
    *("olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss"),
    *("smollm3", "stablelm", "starcoder2"),
}
CAPACITY = 64  # packed rows hold a multiple of it: cheap for attention, and large enough to fill gaps
_SMALL = 512  # tokens; up to here, and up to twice its longest row, an example is one tree


@dataclass(frozen=True)
class Tree:
    """Token tree: the rows of an example behind their common start, flattened.

    Token ``ids[i]`` has position ``positions[i]`` in its row. It reads what comes before it in branch 0, which all rows
    share, and in its own branch. ``targets`` have positions in ``ids``; ``rows`` is the number of rows.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    branches: tuple[int, ...]
    targets: tuple[Target, ...]
    rows: int = 1

    @classmethod
    def of(cls, row: Row) -> "Tree":
        """Return a tree of one row."""
        return cls(row.ids, tuple(range(len(row.ids))), (0,) * len(row.ids), row.targets)

    @property
    def length(self) -> int:
        """Tokens of its longest row."""
        return 1 + max(self.positions)


def packable(model: torch.nn.Module) -> int:
    """Return the length (tokens) up to which rows of ``model`` may be packed; 0 where none may.

    The mask replaces a sliding window, so a row must not be longer than the window.
    """
    base = unwrapped(model)
    config: Any = getattr(base, "config", None)
    if getattr(config, "model_type", None) not in PACKING or config._attn_implementation not in ("sdpa", "eager"):
        return 0
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):  # a mask for these tokens does not cover the virtual ones
        return 0
    return int(getattr(config, "sliding_window", None) or 2**31)


def join(rows: Sequence[Row]) -> list[Tree]:
    """Return the rows of one example joined behind their common start, targets in their order.

    One tree, or several where one would be more than twice as long as the longest row: the cost of attention grows with
    the square of the length.

    >>> one, other = Row((5, 6, 7), (Target(0, (1, 2), (7, 8)),)), Row((5, 6, 9), (Target(1, (1, 2), (9, 3)),))
    >>> (tree,) = join([one, other])
    >>> tree.ids, tree.positions, tree.branches
    ((5, 6, 7, 9), (0, 1, 2, 2), (0, 0, 1, 2))
    """
    columns = zip(*(row.ids for row in rows), strict=False)
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    most = max(_SMALL, 2 * max(len(row.ids) for row in rows))
    groups: list[list[Row]] = [[]]
    length = shared
    for row in rows:
        tail = len(row.ids) - shared
        if groups[-1] and length + tail > most:
            groups.append([])
            length = shared
        groups[-1].append(row)
        length += tail
    return [_tree(group, shared) for group in groups]


def _tree(rows: Sequence[Row], shared: int) -> Tree:
    ids, positions, branches = list(rows[0].ids[:shared]), list(range(shared)), [0] * shared
    targets: list[Target] = []
    for branch, row in enumerate(rows, start=1):
        shift = len(ids) - shared
        ids += row.ids[shared:]
        positions += range(shared, len(row.ids))
        branches += [branch] * (len(row.ids) - shared)
        targets += [
            replace(target, positions=tuple(place if place < shared else place + shift for place in target.positions))
            for target in row.targets
        ]
    return Tree(tuple(ids), tuple(positions), tuple(branches), tuple(targets), len(rows))


def fill(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the row, and the start in it, of each of ``lengths``: first fit, longest first.

    The capacity of a row is the longest length, rounded up to a multiple of `CAPACITY`.

    >>> fill([10, 60, 40])
    [(1, 40), (0, 0), (1, 0)]
    """
    capacity = -(-max(lengths) // CAPACITY) * CAPACITY
    used: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, length in enumerate(used) if length + lengths[i] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        places[i] = (row, used[row])
        used[row] += lengths[i]
    return places


def readable(tree: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Return the attention mask ``(rows, 1, length, length)`` bool, from the tree and the branch of each token.

    A token reads itself and what comes before it in its tree, in branch 0 or its own. Padding (tree -1) reads itself
    and other padding, which keeps its attention finite, and is read by no token.
    """
    order = torch.arange(tree.shape[1], device=tree.device)
    before = order[None, :] <= order[:, None]
    same_tree = tree[:, :, None] == tree[:, None, :]
    visible = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (before & same_tree & visible)[:, None]
