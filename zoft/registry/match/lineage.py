"""Lineage of a checkpoint: the bases that its model card declares (``base_model``), and theirs, level by level."""

from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from zoft.errors import ModelError
from zoft.model.fingerprint import base_hash

LEVELS = 8


def lineage(folder: Path) -> list[str]:
    """Return the bases that the model card of ``folder`` names, then those that their cards name, nearest first.

    A base that is a local folder is listed by name and by base hash, and its own card is followed, at most 8 levels
    deep; a Hub id is listed by name. A card without readable front matter declares nothing.

    >>> lineage(Path("sst2-run/model"))  # doctest: +SKIP
    ['HuggingFaceTB/SmolLM2-135M']
    """
    found: dict[str, None] = {}
    seen, level = {folder.resolve()}, [folder]
    for _ in range(LEVELS):
        names = [(child, name) for child in level for name in _declared(child / "README.md")]
        found |= dict.fromkeys(name for _, name in names)
        parents = {parent for child, name in names if (parent := _local(name, child)) is not None}
        level = sorted(parents - seen)
        seen |= parents
        found |= dict.fromkeys(digest for parent in level for digest in _hash(parent))
    return list(found)


def _declared(readme: Path) -> list[str]:
    if not readme.is_file():
        return []
    try:
        bases = (metadata_load(readme) or {}).get("base_model") or []
    except (ValueError, OSError, yaml.YAMLError):  # written by hand, often wrong; the weights can still be compared
        return []
    bases = [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []
    return [name for name in bases if isinstance(name, str) and name.isprintable()]


def _local(name: str, child: Path) -> Path | None:
    """The folder called ``name``, relative to the folder that names it or to the working directory."""
    candidates = (child / name, Path(name).expanduser())
    return next((path.resolve() for path in candidates if path.is_dir()), None)


def _hash(folder: Path) -> Iterator[str]:
    try:
        yield base_hash(folder)
    except ModelError:  # a base that was moved or pruned is still listed by name
        return
