"""Convert a GGUF file to an ordinary model folder in bfloat16, once, and cache it."""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import struct
import tempfile
from collections.abc import Iterator
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

FORMAT = 1  # increase it when the converted weights change
DTYPE = torch.bfloat16  # of all conversions, so that a GGUF has one base hash
RECORD_FILE = "conversion.json"

logger = logging.getLogger(__name__)


def convert(file: Path) -> Path:
    """Return the folder with the GGUF ``file`` in Hugging Face layout, in bfloat16; convert it if necessary.

    The folder is in ``models/`` under `zoft.files.home`, named by the file's SHA-256 and the converter's version;
    its ``conversion.json`` names the source. Two processes may convert the same file at once.
    `ModelError` if the file is not a GGUF, is truncated, or has an architecture that transformers cannot convert.
    """
    _require_gguf()
    _check_magic(file)
    digest = file_digest(file)
    folder = home() / "models" / f"{file.stem}-{digest[:16]}-{_version_tag()}"
    if not folder.is_dir():
        logger.info("converting %s to bfloat16, once, into %s", file.name, folder)
        model, tokenizer = read_gguf(file)
        _write(model, tokenizer, folder, _record(file, digest))
    return folder


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: dict[str, object]) -> None:
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            checkpoint.write(model, tokenizer, temporary, dtype=DTYPE)
            (temporary / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except RunError:
        if not folder.is_dir():  # else another process has finished the same conversion
            raise


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the dequantised float32 model in ``file`` and its tokenizer."""
    # Dequantise to float32, so that each weight is rounded once, when it is written.
    plain = GgufConfig(dequantize=True)  # without it the configuration would stay quantised
    bars = contextlib.redirect_stderr(io.StringIO())  # dequantisation shows one at any verbosity
    with quiet_transformers(), bars, _alone(file) as folder:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=plain,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False)
        except (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, struct.error) as error:
            raise ModelError(
                f"{file} cannot be converted: {error or type(error).__name__}; the file is truncated, or transformers "
                f"{transformers.__version__} does not read this GGUF architecture"
            ) from error
    return model, tokenizer


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Yield a folder that holds ``file`` alone: what lies beside it (configurations, adapters, code) is not read."""
    with tempfile.TemporaryDirectory(prefix="zoft-gguf-") as folder:
        try:
            (Path(folder) / file.name).symlink_to(file.resolve())
        except OSError:  # a system without links
            yield file.parent
        else:
            yield Path(folder)


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading a GGUF file needs the package gguf: pip install 'zoft[gguf]'")


def _check_magic(file: Path) -> None:
    with file.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError(f"{file} is not a GGUF file (it does not begin with GGUF); download it again")


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
