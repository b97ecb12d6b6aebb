"""From the name that a user gives a model to the local folder that holds it."""

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
    """Where a model lies: the folder of its config and weights, and its Hub commit if it came from the Hub.

    Of an adapter these are the base's, and ``adapter`` is its own folder.
    """

    path: Path
    revision: str | None = None
    adapter: Path | None = None


def resolve(model: str | Path, *, revision: str | None = None) -> Resolved:
    """Return the local folder of ``model``: a folder, a ``.gguf`` file (converted once) or a Hub id (downloaded once).

    A Hub id may name a branch, tag or commit as ``org/name@revision``. Of a Hub repository only configuration,
    tokenizer and safetensors files are fetched; offline the cache serves. For an adapter, as `peft` saves one, its base
    is resolved, too.
    """
    found = _resolve(model, revision)
    return _with_base(found) if adapters.is_adapter(found.path) else found


def _with_base(adapter: Resolved) -> Resolved:
    """The base that an adapter names: relative to the adapter, to where the command runs, or on the Hub."""
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
    """Return the name on the Hub of the model that `resolve` has put in ``folder``; None if it came from elsewhere.

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
        raise ModelError(f"{name} does not exist as a folder or file here and is no valid Hub id (org/name)") from error
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated on the Hub; ask for access on its page and log in (hf auth login)"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision!r} on the Hub; expected a branch, tag or commit") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is neither a folder here nor a public model on the Hub; check the spelling"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{name} is no folder here, not in the Hub cache, and the Hub cannot be reached; "
            "go online once, or give a local folder or .gguf file"
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise ModelError(f"{name} could not be fetched from the Hub: {error}") from error
    return Resolved(folder, revision=folder.name)
