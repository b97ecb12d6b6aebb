"""Which rows may share a batch: a model's scores of a row may depend on padding, or on the longest row of a batch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from zoft.model.architecture import unwrapped
from zoft.tasks.batches import arrange, length_step
from zoft.tasks.logits import needed_logits
from zoft.tasks.packing import Tree, packable
from zoft.tasks.types import Row, Target
from zoft.weights.dtypes import HALF

T = TypeVar("T")

_PADDING = 8  # tokens in front of the row that is scored twice
_known: dict[tuple[str, ...], float] = {}  # by architecture, so that reloading a model does not change its batches


@dataclass(frozen=True)
class Sharing:
    """Which rows may share a batch.

    ``boundary`` is the length up to which rotary embeddings are those of short rows; a batch with a longer row uses
    other ones for all of its rows (Phi-3's longrope), or ones that depend on its length (``by_length``, dynamic
    scaling). ``padding`` is how far padding changes log-probabilities, in nats; None where it changes nothing.
    """

    boundary: int | None = None
    by_length: bool = False
    padding: float | None = None

    def key(self, length: int) -> int:
        """Return the group of a row of ``length`` tokens; rows of one group may share a batch."""
        if self.padding is not None:
            return length
        if self.boundary is None or length <= self.boundary:
            return 0
        return length if self.by_length else 1

    def groups(self, items: Iterable[T], length: Callable[[T], int]) -> list[list[T]]:
        """Return ``items`` in lists that may share a batch, each in its order."""
        found: dict[int, list[T]] = {}
        for item in items:
            found.setdefault(self.key(length(item)), []).append(item)
        return list(found.values())

    def joins(self, rows: Iterable[Row]) -> bool:
        """Whether all ``rows`` may share one batch, padded to a common length."""
        return self.padding is None and len({self.key(len(row.ids)) for row in rows}) <= 1

    def step(self, dtype: torch.dtype) -> int:
        """Return the number that the length of a batch is a multiple of."""
        return length_step(dtype) if self.padding is None else 1

    @property
    def warning(self) -> str | None:
        """What a user should know; None if there is nothing."""
        if self.padding is None:
            return None
        return (
            f"padding changes what this model computes (by {self.padding:.2g} nats a token in a row that was tried): "
            "batches hold rows of one length, without padding, which takes more forward passes"
        )


def sharing(model: Any, rows: Iterable[Row], filler: int) -> Sharing:
    """Return which rows may share a batch of ``model``.

    The shortest of ``rows`` is scored alone and padded, once for an architecture. Those that rows are packed for are
    known to honour padding.
    """
    base = unwrapped(model)
    boundary, by_length = _rope_boundary(getattr(base, "config", None))
    if packable(model):
        return Sharing(boundary, by_length)
    key = (type(model).__name__, type(base).__name__, str(model.dtype), model.device.type, _config_of(base))
    if key not in _known:
        row = min((row for row in rows if row.ids), key=lambda row: len(row.ids), default=None)
        if row is None:
            return Sharing(boundary, by_length)
        _known[key] = _effect_of_padding(model, row.ids, filler)
    return Sharing(boundary, by_length, _known[key] or None)


def _config_of(model: Any) -> str:
    config: Any = getattr(model, "config", None)
    return config.to_json_string() if hasattr(config, "to_json_string") else str(id(model))


def _rope_boundary(config: Any) -> tuple[int | None, bool]:
    """The length beyond which rotary embeddings depend on the longest row, and whether on its very length."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scaling = getattr(text, "rope_parameters", None)
    if not isinstance(scaling, dict):
        return None, False
    found = [one for one in (scaling, *scaling.values()) if isinstance(one, dict) and "rope_type" in one]
    default = getattr(text, "original_max_position_embeddings", None) or getattr(text, "max_position_embeddings", None)
    limits = [
        (int(one.get("original_max_position_embeddings") or default or 0), one["rope_type"] == "dynamic")
        for one in found
        if one["rope_type"] in ("longrope", "dynamic")
    ]
    return (min(limit for limit, _ in limits), any(dynamic for _, dynamic in limits)) if limits else (None, False)


def _effect_of_padding(model: Any, ids: Sequence[int], filler: int) -> float:
    """How far padding moves the log-probabilities after ``ids``, in nats; 0.0 if no further than rounding does."""
    text: Any = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**30
    padding = min(_PADDING, int(context) - len(ids))
    if padding < 1:
        ids, padding = ids[-max(1, int(context) - _PADDING) :], _PADDING
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone, padded, other = (
                _log_probs(model, ids, token, length)
                for token, length in ((filler, len(ids)), (filler, len(ids) + padding), (ids[0], len(ids) + padding))
            )
    finally:
        model.train(training)
    half = model.dtype in HALF or torch.is_autocast_enabled(model.device.type)
    moved, read = ((one - padded).abs().nan_to_num(0.0).mean().item() for one in (alone, other))
    # Rounding depends on the length, but what stands in the padding must not matter at all: it does not change a shape,
    # except that of the batches of experts.
    experts = any("expert" in name for name, _ in unwrapped(model).named_modules())
    return max(moved, read) if moved > (0.1 if half else 5e-4) or read > (0.1 if half and experts else 1e-5) else 0.0


def _log_probs(model: Any, ids: Sequence[int], filler: int, length: int) -> torch.Tensor:
    """Log-probabilities of the token after ``ids``, ``(vocabulary,)`` float32, padded on the left to ``length``."""
    row = Row(tuple(ids), (Target(0, (len(ids) - 1,), (ids[-1],)),))
    logits = needed_logits(model, arrange([Tree.of(row)], filler, model.device, length, packed=False))
    return torch.log_softmax(logits[0].float(), dim=0)
