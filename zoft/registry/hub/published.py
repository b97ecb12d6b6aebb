"""What is known of a model on the Hub without downloading its weights."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelInfo

from zoft.errors import ModelError
from zoft.model.checkpoint import SINGLE_FILE, weight_files
from zoft.model.load import meta_model, read_config
from zoft.registry.card.card import BaseFile
from zoft.registry.hub.client import TIMEOUT, HubName, call
from zoft.registry.hub.pull import fetch
from zoft.registry.match.candidates import Subject
from zoft.weights.blocks import architecture_hash, trainable_blocks

LARGEST_CONFIG = 4_000_000  # bytes


def downloaded(model: str | Path) -> bool:
    """Whether the weights of ``model`` (folder, ``.gguf`` file or Hub id) are on this machine."""
    if Path(model).expanduser().exists() or (name := HubName.of(str(model))) is None:
        return True  # what is no Hub id either is refused where it is loaded
    config = huggingface_hub.try_to_load_from_cache(name.repo, "config.json", revision=name.revision)
    if not isinstance(config, str):
        return False
    try:
        return bool(weight_files(Path(config).parent))
    except ModelError:
        return False


def published(model: str) -> Subject:
    """Describe the Hub model ``model`` by what is published of it: configuration, lineage and the files' SHA-256.

    Its weights are not downloaded, so base hash and samples are None. Raises `CardError` if it is not there.
    """
    name = HubName.parse(model)
    info = call(
        model,
        lambda: huggingface_hub.HfApi().model_info(
            name.repo, revision=name.revision, files_metadata=True, timeout=TIMEOUT
        ),
    )
    folder = config_folder(name.at(str(info.sha)))
    blocks = trainable_blocks(meta_model(read_config(folder)))
    return Subject(
        base_hash=None,
        blocks=blocks,
        samples=None,
        lineage=declared_bases(info),
        files=_weight_files(info),
        id=name.repo,
        architecture_hash=architecture_hash(blocks),
    )


def config_folder(name: HubName) -> Path:
    """Return a folder that holds the repository's ``config.json``, and nothing that was downloaded for this."""
    return fetch(name, "config.json", LARGEST_CONFIG).path.parent


def declared_bases(info: ModelInfo) -> list[str]:
    """Return what the model card of a repository names as its bases."""
    bases = (info.card_data.to_dict() if info.card_data else {}).get("base_model") or []
    return [base for base in ([bases] if isinstance(bases, str) else bases) if isinstance(base, str)]


def _weight_files(info: ModelInfo) -> list[BaseFile]:
    """The files that transformers would load, as the Hub publishes them; empty if a SHA-256 is not told."""
    said = {one.rfilename: one for one in info.siblings or []}
    names = [SINGLE_FILE] if SINGLE_FILE in said else sorted(name for name in said if _is_shard(name))
    large = {name: said[name].lfs for name in names}
    files = [BaseFile(name=name, size=lfs.size, sha256=lfs.sha256) for name, lfs in large.items() if lfs is not None]
    return files if len(files) == len(names) else []


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and "-of-" in name and name.endswith(".safetensors")
