"""Convert a GGUF file to an ordinary model folder in bfloat16, once, and cache it."""

import atexit
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

import zoft
from zoft.errors import ModelError, RunError
from zoft.files import home, replacing, sweep
from zoft.model import checkpoint
from zoft.model.hashes import file_digest
from zoft.quiet import quiet_transformers

FORMAT = 1  # increase it when the converted weights change
DTYPE = torch.bfloat16  # of all conversions, so that a GGUF has one base hash
RECORD_FILE = "conversion.json"

_DAY = 86_400  # seconds; no conversion takes longer
_ELSEWHERE: dict[Path, Path] = {}  # folders of this process, by the folder that could not be written

logger = logging.getLogger(__name__)


def convert(file: Path) -> Path:
    """Return the folder with the GGUF ``file`` in Hugging Face layout, in bfloat16; convert it if necessary.

    The folder is in ``models/`` under `zoft.files.home`, named by the file's SHA-256 and the converter's version;
    its ``conversion.json`` names the source, and size and SHA-256 of every file in it. A folder with other files, cut
    or damaged, is converted again. Two processes may convert the same file at once.
    `ModelError` if the file is not a GGUF, is truncated, or has an architecture that transformers cannot convert.
    """
    _require_gguf()
    _check_magic(file)
    digest = file_digest(file)
    folder = home() / "models" / f"{file.stem}-{digest[:16]}-{_version_tag()}"
    folder = _ELSEWHERE.get(folder, folder)
    if not _is_whole(folder):
        again = " again, since the folder is damaged" if folder.exists() else ""
        logger.info("converting %s to bfloat16, once%s, into %s", file.name, again, folder)
        model, tokenizer = read_gguf(file)
        record = _record(file, digest)
        try:
            _write(model, tokenizer, folder, record)
        except RunError as error:  # a read-only or full home is no reason to stop
            _ELSEWHERE[folder] = elsewhere = Path(tempfile.mkdtemp(prefix="zoft-")) / folder.name
            atexit.register(shutil.rmtree, elsewhere.parent, ignore_errors=True)
            logger.warning("%s; the converted model is kept for this process only, in %s", error, elsewhere)
            _write(model, tokenizer, elsewhere, record)
            return elsewhere
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether ``folder`` has the files, sizes and SHA-256 that its record names; zoft 0.1 recorded none of these."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        if record["source"] and "files" not in record:  # of zoft 0.1
            return bool(checkpoint.weight_files(folder)) and (folder / "config.json").stat().st_size > 0
        return all(
            (folder / name).stat().st_size == size and file_digest(folder / name) == digest
            for name, (size, digest) in record["files"].items()
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ModelError):
        return False


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, record: dict[str, object]) -> None:
    sweep(folder.parent, older_than=_DAY)
    try:
        with replacing(folder) as temporary:
            temporary.mkdir()
            checkpoint.write(model, tokenizer, temporary, dtype=DTYPE)
            files = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(temporary.iterdir())}
            text = json.dumps(record | {"files": files}, indent=2)
            (temporary / RECORD_FILE).write_text(text + "\n", encoding="utf-8")
            if folder.exists() and not _is_whole(folder):
                folder.unlink() if folder.is_file() else shutil.rmtree(folder)
    except RunError:
        if not _is_whole(folder):  # else another process has finished the same conversion
            raise


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
