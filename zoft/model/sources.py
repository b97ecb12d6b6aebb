"""Resolve the name of a model (Hub id, folder or GGUF file) to a local folder."""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id

from zoft.errors import ModelError
from zoft.model import adapters, gguf

_HUB_FILES = (  # configuration, tokenizer, weights and model card: no code, no pickle
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
)


@dataclass(frozen=True)
class Resolved:
    """Location of a model: the folder of its config and weights, and its commit if it came from the Hub.

    For an adapter these are the base's, and ``adapter`` is the adapter's folder.
    """

    path: Path
    revision: str | None = None
    adapter: Path | None = None


def resolve(model: str | Path, *, revision: str | None = None) -> Resolved:
    """Return the local folder of ``model``: a folder, a ``.gguf`` file (converted once) or a Hub id (downloaded once).

    A Hub id may name a branch, tag or commit as ``org/name@revision``. Only configuration, tokenizer and safetensors
    files of a Hub repository are downloaded; offline, the cache is used. The base of an adapter in `peft`'s format is
    resolved, too.
    """
    found = _resolve(model, revision)
    return _with_base(found) if adapters.is_adapter(found.path) else found


def _with_base(adapter: Resolved) -> Resolved:
    """Return ``adapter`` with its base, whose name is relative to the adapter or the working directory, or a Hub id."""
    name, revision = adapters.base_of(adapter.path)
    beside = adapter.path / name
    try:
        base = _resolve(beside if beside.is_dir() else name, revision)
    except ModelError as error:
        raise ModelError(f"{adapter.path} is an adapter, and its base model is not found: {error}") from error
    if adapters.is_adapter(base.path):
        raise ModelError(f"{adapter.path} is an adapter on another adapter, {name}; merge that into its base first")
    return Resolved(base.path, base.revision, adapter.path)


def _resolve(model: str | Path, revision: str | None) -> Resolved:
    path = Path(model).expanduser()
    if path.is_dir():
        return Resolved(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path} is a file; expected a model folder, a .gguf file or a Hub id such as org/name")
        return Resolved(gguf.convert(path))
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")) or path.suffix.lower() == ".gguf":
        raise ModelError(f"{model} does not exist; expected a model folder, a .gguf file or a Hub id such as org/name")
    name, _, named_revision = str(model).partition("@")
    return _from_hub(name, revision or named_revision or None)


def hub_id(folder: Path) -> str | None:
    """Return the Hub id of the model that `resolve` downloaded to ``folder``; None if it came from elsewhere.

    >>> hub_id(Path("hub/models--org--name/snapshots/7b42fd41a1d2c5d1a76e1a9ab0d10b8d3f8a7d10"))
    'org/name'
    """
    kind, *parts = folder.parent.parent.name.split("--")
    return "/".join(parts) if folder.parent.name == "snapshots" and kind == "models" and parts else None


def _from_hub(name: str, revision: str | None) -> Resolved:
    try:
        validate_repo_id(name)
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except hub.HFValidationError as error:
        raise ModelError(f"{name} does not exist here and is not a valid Hub id (org/name)") from error
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated on the Hub; request access on its page and log in (hf auth login)"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the Hub; expected a branch, tag or commit") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is neither a folder here nor a public model on the Hub; check the spelling"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{name} is not a folder here, not in the Hub cache, and the Hub cannot be reached; "
            "go online once, or give a local folder or .gguf file"
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise ModelError(f"{name} could not be downloaded from the Hub: {error}") from error
    return Resolved(folder, revision=folder.name)
