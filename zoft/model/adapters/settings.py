"""Settings of LoRA and prefix tuning; the defaults are those of MeZO's table."""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from zoft.weights.blocks import Mode

MODES: dict[Mode, str] = {"full": "the full model", "lora": "LoRA adapters", "prefix": "prefixes"}


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    mode: ClassVar[Mode]


class LoRA(_Settings):
    """LoRA (arXiv 2106.09685): ``W + alpha / rank B A``, where B starts at zero; rank and alpha as in MeZO's table.

    >>> LoRA(targets="q_proj, v_proj").targets
    ('q_proj', 'v_proj')
    """

    mode: ClassVar[Mode] = "lora"

    rank: int = Field(8, ge=1, le=2**16, description="rank of the update, r")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="names of linear modules; default: query and value projections"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(sorted({str(part).strip() for part in parts})) if isinstance(parts, list | tuple) else parts


class Prefix(_Settings):
    """Prefix tuning (arXiv 2101.00190) as in MeZO: no reparametrisation, started from activations of real tokens.

    >>> Prefix().tokens
    5
    """

    mode: ClassVar[Mode] = "prefix"

    tokens: int = Field(5, ge=1, le=2**16, description="virtual tokens in every layer")


Adapter = LoRA | Prefix


def _parse_switch(value: Any) -> Any:
    """Turn ``true`` into default settings and ``false`` into None."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "yes", "on"):
        return {}
    return None if word in (False, "false", "no", "off") else value


LoRASetting = Annotated[LoRA | None, BeforeValidator(_parse_switch)]  # a field of a configuration
PrefixSetting = Annotated[Prefix | None, BeforeValidator(_parse_switch)]


def single_adapter(lora: LoRA | None, prefix: Prefix | None) -> Adapter | None:
    """Return the adapter that is set, or None; `ValueError` if both are."""
    if lora is not None and prefix is not None:
        raise ValueError("lora and prefix are both asked for: a run trains one kind of adapter")
    return lora or prefix
