"""The result of `zoft.metatrain.metatrain`; its fields are the keys that ``--json`` prints."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class MetatrainResult(BaseModel):
    """Outcome of a meta-training.

    ``lr`` and ``eps`` are recommended by the card (None without evidence), ``meta_lr`` is the learned rate of the
    zeroth-order steps; ``forwards`` are those of the meta-training, ``evidence_forwards`` those of the runs after it;
    ``tuner`` is the digest of the card in ``out``; ``strength`` is 0 if MeZO was better and the card is MeZO.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model: str
    tasks: tuple[str, ...]
    steps: int
    skipped_steps: int
    forwards: int
    evidence_forwards: int
    meta_lr: float
    strength: float
    lr: float | None
    eps: float | None
    seed: int
    verdict: str
    tuner: str
    bytes: int
    seconds: float
    peak_memory_bytes: int
    out: Path
    job: Path

    def public(self) -> dict[str, Any]:
        """The result as JSON values."""
        return self.model_dump(mode="json")
