"""Schema of a tuner card: the JSON under the metadata key ``zoft``, format 1, with the bounds of every value."""

import datetime
import math
from collections import Counter
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic.types import StringConstraints

from zoft.model.adapters import Adapter, Mode
from zoft.registry.card.evidence import Evidence
from zoft.tuner.features import Inputs
from zoft.tuner.networks import Activation, EffectiveSize, Granularity, RecurrentScale, group_of

FORMAT: Literal[1] = 1
MAX_BLOCKS = 20_000
MAX_WEIGHTS = 2**45  # of one block
LR_BOUNDS = (1e-12, 0.1)  # sane recommendations: published rates are 1e-7 to 1e-2,
EPS_BOUNDS = (1e-7, 1.0)  # published eps 1e-3 and 1e-1


def _printable(text: str) -> str:
    """Refuse control characters, which would act on the terminal that shows the card."""
    if not text.replace("\n", "").isprintable():
        raise ValueError("a control character")
    return text


def _settings(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    _check_plain(value, depth=8)
    return value


def _check_plain(value: JsonValue, depth: int) -> None:
    if depth == 0:
        raise ValueError("settings nested more than 8 deep")
    if isinstance(value, dict):
        for key, item in value.items():
            _printable(key)
            _check_plain(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, depth - 1)
    elif isinstance(value, str):
        _printable(value)
    elif isinstance(value, int | float) and not abs(value) < 2**64:
        raise ValueError("a number that is not finite or beyond 2**64")


Line = Annotated[
    str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\r\n]*$"), AfterValidator(_printable)
]
Text = Annotated[str, StringConstraints(max_length=4096), AfterValidator(_printable)]
FileName = Annotated[str, StringConstraints(max_length=255, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
BlockName = Annotated[
    str, StringConstraints(max_length=256, pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")
]  # a path of attributes: no empty part, no slash
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(allow_inf_nan=False, gt=0, le=1e30)]
Rate = Annotated[float, Field(allow_inf_nan=False, ge=LR_BOUNDS[0], le=LR_BOUNDS[1])]
Radius = Annotated[float, Field(allow_inf_nan=False, ge=EPS_BOUNDS[0], le=EPS_BOUNDS[1])]
Count = Annotated[int, Field(ge=0, le=2**53)]
Settings = Annotated[dict[str, JsonValue], AfterValidator(_settings)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseFile(_Part):
    """A weight file of the base model as it was published: name, size in bytes, SHA-256."""

    name: FileName
    size: Count
    sha256: Digest


class BaseSpec(_Part):
    """The base model: its name, its base hash (None if only the architecture is known) and its files."""

    id: Line
    hash: Digest | None
    architecture_hash: Digest
    files: tuple[BaseFile, ...] = ()
    source_note: Text = ""


class BlockSpec(_Part):
    """A block of the base: its name in the unwrapped model and its shape."""

    name: BlockName
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=2**40)], ...], Field(max_length=8)]

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for length in self.shape:
            size *= length
        return size


class TrainableSpec(_Part):
    """Which weights the blocks are: the model's own, LoRA adapters or prefixes, with the settings of these."""

    mode: Mode = "full"
    settings: Settings = {}

    @classmethod
    def of(cls, adapter: Adapter | None) -> "TrainableSpec":
        """Describe the trained weights of a model with ``adapter``; None: the model's own."""
        return cls() if adapter is None else cls(mode=adapter.mode, settings=adapter.model_dump(mode="json"))

    def difference(self, other: "TrainableSpec") -> str:
        """Return the settings that differ from those of ``other``, as ``name value, not other value``; empty if none.

        >>> eight, four = (TrainableSpec(mode="lora", settings={"rank": rank}) for rank in (8, 4))
        >>> eight.difference(four)
        'rank 8, not 4'
        """
        names = sorted({*self.settings, *other.settings})
        pairs = [(name, self.settings.get(name), other.settings.get(name)) for name in names]
        return "; ".join(
            f"{name} {_plain(mine)}, not {_plain(theirs)}" for name, mine, theirs in pairs if mine != theirs
        )


ALL_WEIGHTS = TrainableSpec()


def _plain(value: JsonValue) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


class LevelSpec(_Part):
    """One level of PertNNs, one network a group; `zoft.tuner.networks.group_of` gives the group of a block."""

    granularity: Granularity
    groups: tuple[Line, ...]


class NetworkSpec(_Part):
    """The form of the PertNNs. The raw outputs of all levels are added before the activation.

    ``strength`` is the exponent that tempers the scales: 0 is MeZO, 1 the tuner as it was learned.
    """

    levels: Annotated[tuple[LevelSpec, ...], Field(min_length=1, max_length=2)]
    inputs: Inputs
    activation: Activation
    hidden: Annotated[int, Field(ge=1, le=1024)]
    recurrent: RecurrentScale
    effective_size: EffectiveSize = "full"
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0


class TrainingSpec(_Part):
    """How the tuner was meta-trained; steps and forwards are totals, versions those of the libraries."""

    config: Settings = {}
    tasks: tuple[Line, ...] = ()
    seeds: tuple[Count, ...] = ()
    steps: Count = 0
    forwards: Count = 0
    versions: dict[Line, Line] = {}


class EvidenceRow(_Part):
    """One run on data held out of meta-training: of the tuner, or of a control at equal forward passes.

    ``name`` is the contender (``tuner``, ``mezo``, ``random``, ``energy``). A loss that was not finite is None.
    """

    name: Line
    task: Line
    split: Line
    lr: Positive
    eps: Positive
    forwards: Count
    seed: Count
    loss_start: Number | None
    loss: Number | None
    metric: Number | None = None
    metric_name: Line | None = None

    @property
    def label(self) -> str:
        """Name of the contender."""
        return self.name

    @property
    def chosen_by(self) -> float:
        """The loss; infinite if the run diverged."""
        return math.inf if self.loss is None else self.loss


class Recommended(_Part):
    """Learning rate and eps that the evidence supports; None without evidence. A run takes them without being asked."""

    lr: Rate | None = None
    eps: Radius | None = None

    @classmethod
    def of(cls, lr: float | None, eps: float | None) -> "Recommended":
        """Recommend the values that are within the bounds; the others are left out.

        >>> Recommended.of(lr=3.0, eps=1e-3)
        Recommended(lr=None, eps=0.001)
        """
        bounds = {"lr": (*LR_BOUNDS, lr), "eps": (*EPS_BOUNDS, eps)}
        return cls(**{name: x for name, (low, high, x) in bounds.items() if x is not None and low <= x <= high})


def rate_for(steps: int, lr: float, found_in: int) -> float:
    """Return the learning rate for a run of ``steps`` where ``lr`` was the best in runs of ``found_in`` steps.

    Over ``T`` steps the best constant rate falls like ``T ** -0.5`` once the noise of the steps outweighs their slope
    (arXiv 1309.5549, corollary 3.3). A shorter run keeps ``lr``: a higher one was not tried and might diverge.

    >>> rate_for(400, 3e-5, found_in=100), rate_for(50, 3e-5, found_in=100)
    (1.5e-05, 3e-05)
    """
    return lr * min(1.0, (found_in / steps) ** 0.5)


class TunerCard(_Part):
    """The JSON of a card; the weights of its networks are tensors beside it (`zoft.registry.Card`)."""

    format: Literal[1] = FORMAT
    base: BaseSpec
    blocks: Annotated[tuple[BlockSpec, ...], Field(min_length=1, max_length=MAX_BLOCKS)]
    trainable: TrainableSpec = TrainableSpec()
    network: NetworkSpec
    training: TrainingSpec = TrainingSpec()
    evidence: Annotated[tuple[EvidenceRow, ...], Field(max_length=2000)] = ()
    verdict: Text = ""
    recommended: Recommended = Recommended()
    created: datetime.date

    @property
    def longest_runs(self) -> tuple[EvidenceRow, ...]:
        """The last round of the evidence: on each task, the runs of the most forwards."""
        return Evidence(self.evidence).longest().runs

    @property
    def recommended_steps(self) -> int | None:
        """Steps of the longest runs with the recommended learning rate; None if the evidence has none."""
        forwards = [row.forwards for row in self.evidence if row.lr == self.recommended.lr]
        return max(forwards) // 2 if forwards and max(forwards) > 1 else None

    def lr_for(self, steps: int) -> float | None:
        """The recommended learning rate, lowered for runs longer than those in the evidence; None if there is none."""
        lr, found_in = self.recommended.lr, self.recommended_steps
        return lr if lr is None or found_in is None else rate_for(steps, lr, found_in)

    @model_validator(mode="after")
    def _consistent(self) -> "TunerCard":
        names = [block.name for block in self.blocks]
        (name, times), *_ = Counter(names).most_common(1)
        if times > 1:
            raise ValueError(f"block {name} is listed {times} times")
        if large := [block.name for block in self.blocks if block.size > MAX_WEIGHTS]:
            raise ValueError(f"block {large[0]} has more than 2**45 weights")
        for level in self.network.levels:
            expected = list(dict.fromkeys(group_of(name, level.granularity) for name in names))
            if list(level.groups) != expected:
                raise ValueError(_group_difference(level, expected))
        return self


def _group_difference(level: LevelSpec, expected: list[str]) -> str:
    extra = [group for group in level.groups if group not in set(expected)]
    missing = [group for group in expected if group not in set(level.groups)]
    what = f"extra {extra[0]}" if extra else f"without {missing[0]}" if missing else "in another order"
    return (
        f"{level.granularity} groups do not belong to the blocks: {len(level.groups)}, {what}; expected {len(expected)}"
    )
