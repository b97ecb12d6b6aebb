"""The lines of a journal as pydantic models: their fields, and how they are written as JSON."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, field_validator

from zoft.optim import ProjectionRecord, StepRecord

FORMAT = 3  # of a run with exact gradients
PLAIN_FORMAT = 2  # of other runs; 1 had no projections, no forwards, and two-sided probes only

# JSON has no infinities: a loss that is not finite is written as "inf", "-inf" or "nan".
Loss = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(lambda value: float(value) if value in ("inf", "-inf", "nan") else value),
    PlainSerializer(lambda value: value if np.isfinite(value) else str(float(value))),
]


Positive = Annotated[float, Field(gt=0)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TunerUsed(_Line):
    """The tuner card of a run: its digest, the name that the user gave, its base, and how it fits the model."""

    digest: str
    source: str
    base: str
    match: str


class HeaderLine(_Line):
    """Header: what a run started from; ``start`` is the SHA-256 of its adapter's initial weights, if it trains one.

    ``exact_rows`` are the rows of an exact head that move, where not all do.

    Journals of early versions have no ``data_hash`` and no ``tuner``.
    """

    kind: Literal["header"] = "header"
    format: int = PLAIN_FORMAT
    base: str
    base_hash: str
    data_hash: str | None = None
    config: dict[str, Any]
    lr: Positive
    eps: Positive
    dtype: str
    device: str
    threads: Annotated[int, Field(ge=1, le=2**16)]
    noise: str
    versions: dict[str, str]
    tuner: TunerUsed | None = None
    start: str | None = None
    exact_rows: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @field_validator("config")
    @classmethod
    def _usable(cls, config: dict[str, Any]) -> dict[str, Any]:
        """Check the values that are read without further checks: the seed of every record, and the method."""
        seed, method = config.get("seed", 0), config.get("method", "")
        if not isinstance(seed, int) or not 0 <= seed < 2**63 or not isinstance(method, str):
            raise ValueError("seed is not a number from 0 to 2**63 - 1, or method is not a name")
        return config

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        return int(self.config.get("seed", 0))

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.config.get("method", ""))


class StepLine(_Line):
    """A `StepRecord` without its seed, which is in the header.

    ``scales`` and ``exact`` are base64 of little-endian float32.
    """

    kind: Literal["step"] = "step"
    step: int = Field(ge=0)
    lr: list[float]
    eps: Positive
    losses: Annotated[list[tuple[Loss, Loss]], Field(min_length=1)]
    scales: str | None = None
    extra: dict[str, Loss | tuple[Loss, ...]] | None = None
    sides: int | None = None
    forwards: int | float | None = None
    exact: dict[str, str] | None = None

    @classmethod
    def of(cls, record: StepRecord) -> "StepLine":
        """Return the line of ``record``."""
        scales = None
        if record.scales is not None:
            scales = base64.b64encode(np.asarray(record.scales, dtype="<f4").tobytes()).decode()
        return cls(
            step=record.step,
            lr=list(record.lr),
            eps=record.eps,
            losses=list(record.losses),
            scales=scales,
            extra=dict(record.extra) or None,
            sides=None if record.sides == 2 else record.sides,
            forwards=None if record.forwards == 2 * len(record.losses) else record.forwards,
            exact={name: base64.b64encode(raw).decode() for name, raw in record.exact.items()} or None,
        )

    def record(self, seed: int) -> StepRecord:
        """Return the record of this line."""
        scales = None
        if self.scales is not None:
            packed = np.frombuffer(base64.b64decode(self.scales, validate=True), dtype="<f4")
            scales = tuple(float(scale) for scale in packed)
        record = StepRecord(
            step=self.step,
            seed=seed,
            lr=tuple(self.lr),
            eps=self.eps,
            losses=tuple(self.losses),
            scales=scales,
            extra=self.extra or {},
            sides=2 if self.sides is None else self.sides,
            forwards=-1 if self.forwards is None else self.forwards,
            exact={name: base64.b64decode(raw, validate=True) for name, raw in (self.exact or {}).items()},
        )
        numbers = [np.asarray(scales or ()), *(np.frombuffer(raw, dtype="<f4") for raw in record.exact.values())]
        if not record.skipped and not np.isfinite(np.concatenate(numbers)).all():
            raise ValueError("a number that is not finite, in a step that was taken")
        return record


class ProjectionLine(_Line):
    """A `ProjectionRecord`; comes after the line of its step."""

    kind: Literal["projection"] = "projection"
    step: int = Field(ge=0)
    ratios: list[float]
    norms: list[float]
    losses: list[Loss]
    forwards: int | float

    @classmethod
    def of(cls, record: ProjectionRecord) -> "ProjectionLine":
        """Return the line of ``record``."""
        return cls.model_validate(vars(record), from_attributes=True)

    def record(self) -> ProjectionRecord:
        """Return the record of this line."""
        ratios, norms, losses = tuple(self.ratios), tuple(self.norms), tuple(self.losses)
        return ProjectionRecord(self.step, ratios, norms, losses, self.forwards)


class EvalLine(_Line):
    """Dev evaluation of the weights after ``step`` steps; ``seconds`` is the run's time so far.

    ``displacement``: ``|theta - theta_0|`` of every block, where it is logged.
    """

    kind: Literal["eval"] = "eval"
    step: int = Field(ge=0)
    loss: Loss
    metric: float | None = None
    kept: bool
    seconds: float
    displacement: dict[str, float] | None = None


class EndLine(_Line):
    """End of a run: the kept step, the SHA-256 of its weights in the run's dtype, and the printed result."""

    kind: Literal["end"] = "end"
    kept: int = Field(ge=0)
    sha256: str
    result: dict[str, Any]


Line = HeaderLine | StepLine | ProjectionLine | EvalLine | EndLine
LINES: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])
