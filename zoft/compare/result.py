"""The result of a comparison; its fields are the keys that ``--json`` prints."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class CompareResult(BaseModel):
    """The rows of a comparison, wins, and the files of the report.

    ``done`` of ``total`` runs are finished; ``rows`` holds a row once all of its runs are.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    budget: int
    batch_size: int
    seeds: tuple[int, ...]
    done: int
    total: int
    rows: tuple[dict[str, Any], ...]
    wins: dict[str, dict[str, dict[str, Any]]]
    out: Path
    page: Path
    table: Path

    def public(self) -> dict[str, Any]:
        """The result as JSON values."""
        return self.model_dump(mode="json")
