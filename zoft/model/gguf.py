"""GGUF files as ordinary model folders: dequantised to bfloat16 once, then kept."""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import struct
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

import zoft
from zoft.errors import ModelError, RunError
from zoft.files import home, replacing
from zoft.model import checkpoint
from zoft.model.hashes import file_digest
from zoft.quiet import quiet_transformers

FORMAT = 1  # raise it when the conversion changes the weights it writes
DTYPE = torch.bfloat16  # the one dtype of conversions, so that a GGUF has one base hash
RECORD_FILE = "conversion.json"

logger = logging.getLogger(__name__)


def convert(file: Path) -> Path:
    """Return the folder that holds the GGUF ``file`` in Hugging Face layout, in bfloat16; convert it if need be.

    The folder lies in ``models/`` under `zoft.files.home`, named by the file's SHA-256 and the converter's version,
    and says in ``conversion.json`` what it was made from. Two processes may convert the same file at once.
    `ModelError` for a file that is no GGUF, is torn, or is of an architecture that transformers cannot convert.
    """
    _require_gguf()
    _check_magic(file)
    digest = file_digest(file)
    folder = home() / "models" / f"{file.stem}-{digest[:16]}-{_version_tag()}"
    if not folder.is_dir():
        logger.info("converting %s to bfloat16, once, into %s", file.name, folder)
        model, tokenizer = _read(file)
        _write(model, tokenizer, folder, _record(file, digest))
    return folder


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: dict[str, object]) -> None:
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            checkpoint.write(model, tokenizer, temporary, dtype=DTYPE)
            (temporary / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except RunError:
        if not folder.is_dir():  # else another process has finished the same conversion meanwhile
            raise


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Dequantise to float32, so that each weight is rounded once, on writing.
    plain = GgufConfig(dequantize=True)  # without it the configuration stays that of a quantised model
    bars = contextlib.redirect_stderr(io.StringIO())  # dequantisation draws one whatever the verbosity
    with quiet_transformers(), bars:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=plain
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, struct.error) as error:
            raise ModelError(
                f"{file} cannot be converted: {error or type(error).__name__}; the file is torn, or transformers "
                f"{transformers.__version__} does not read this GGUF architecture"
            ) from error
    return model, tokenizer


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading a GGUF file needs the package gguf; pip install 'zoft[gguf]'")


def _check_magic(file: Path) -> None:
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file (it does not begin with GGUF); fetch it again")


def _version_tag() -> str:
    return f"{FORMAT}-{transformers.__version__}-{importlib.metadata.version('gguf')}"


def _record(file: Path, digest: str) -> dict[str, object]:
    return {
        "source": {"name": file.name, "size": file.stat().st_size, "sha256": digest},
        "dtype": "bfloat16",
        "format": FORMAT,
        "versions": {
            "zoft": zoft.__version__,
            "transformers": transformers.__version__,
            "gguf": importlib.metadata.version("gguf"),
        },
    }
