"""What the Hub publishes about a model, read without downloading its weights."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelInfo

from zoft.errors import ModelError
from zoft.model.checkpoint import SINGLE_FILE, weight_files
from zoft.registry.card.schema import BaseFile
from zoft.registry.hub.client import HubName, call, repository
from zoft.registry.hub.pull import fetch

LARGEST_CONFIG = 4_000_000  # bytes


def downloaded(model: str | Path) -> bool:
    """Return whether the weights of ``model`` (folder, ``.gguf`` file or Hub id) are on this machine."""
    if Path(model).expanduser().exists() or (name := HubName.of(str(model))) is None:
        return True  # what is not a Hub id either is refused where it is loaded
    config = huggingface_hub.try_to_load_from_cache(name.repo, "config.json", revision=name.revision)
    if not isinstance(config, str):
        return False
    try:
        return bool(weight_files(Path(config).parent))
    except ModelError:
        return False


def model_info(model: str) -> tuple[ModelInfo, HubName]:
    """Return the Hub's description of ``model``, and its repository at the commit described."""
    name = HubName.parse(model)
    info = call(model, lambda: repository(name, blobs=True))
    return info, name.at(str(info.sha))


def config_folder(name: HubName) -> Path:
    """Return a folder that holds the repository's ``config.json``; no other file is downloaded."""
    return fetch(name, "config.json", LARGEST_CONFIG).path.parent


def declared_bases(info: ModelInfo) -> list[str]:
    """Return the bases that the model card of a repository names."""
    bases = (info.card_data.to_dict() if info.card_data else {}).get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []
    return [base for base in bases if isinstance(base, str) and base.isprintable()]


def published_weights(info: ModelInfo) -> list[BaseFile]:
    """Return the files that transformers would load, as the Hub publishes them; empty if one has no SHA-256."""
    files = {one.rfilename: one for one in info.siblings or []}
    names = [SINGLE_FILE] if SINGLE_FILE in files else sorted(name for name in files if _is_shard(name))
    large = {name: files[name].lfs for name in names}
    found = [BaseFile(name=name, size=lfs.size, sha256=lfs.sha256) for name, lfs in large.items() if lfs is not None]
    return found if len(found) == len(names) else []


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and "-of-" in name and name.endswith(".safetensors")
