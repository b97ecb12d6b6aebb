"""Read the tuners that the authors of ZO Fine-tuner released (arXiv 2510.00419), without running their pickles.

A file is what ``torch.save`` writes for a dictionary of block name ->
``Sequential(Linear(5, 64), Tanh(), Linear(64, 1))`` in float32 or float16: a zip archive of one pickle and the bytes of
every tensor. Anything else is refused.
"""

import io
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from zoft.errors import CardError, shown
from zoft.registry.card.schema import MAX_BLOCKS
from zoft.registry.released.pickled import Note, read_pickle
from zoft.tuner.features import INPUTS

HIDDEN = 64
LARGEST_FILE = 64_000_000  # bytes; the largest released tuner, of 772 blocks, has 2.8 MB
LARGEST_STORAGE = 1 << 16  # bytes of one weight; a file may refer to it many times
_STORAGES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16}
_SEQUENTIAL, _LINEAR, _TANH = (
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.activation.Tanh",
)
_PARAMETER, _TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
_KNOWN = {*_STORAGES, _SEQUENTIAL, _LINEAR, _TANH, _PARAMETER, _TENSOR, "__builtin__.set", "builtins.set"}
_DAMAGED = "expected a tuner as the authors released it, saved by torch.save"
_BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, OverflowError)

Network = dict[str, torch.Tensor]


def read_released(path: Path) -> dict[str, Network]:
    """Return the networks in ``path`` by block: ``w1`` (64, 5), ``b1`` and ``w2`` (64,), ``b2`` (), in their dtype.

    Raises:
        CardError: no such file, or one with any other content.
    """
    if not path.is_file():
        raise CardError(f"{path} is not a file; expected a tuner as the authors released it (*.pth)")
    with path.open("rb") as handle:
        content = handle.read(LARGEST_FILE)
    if len(content) >= LARGEST_FILE:
        raise CardError(f"{path} has {LARGEST_FILE // 10**6} MB or more, too large for a tuner")
    try:
        archive = _Archive(content)
        return _networks(read_pickle(archive.pickle, _KNOWN), archive)
    except CardError as error:
        raise CardError(f"{path}: {error}") from error.__cause__


class _Archive:
    """The zip file that torch.save writes: one pickle, and the bytes of every tensor, not compressed."""

    def __init__(self, content: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(content))
        except _BAD_ZIP as error:
            why = "files of torch before 1.6 and plain pickles are not read"
            raise CardError(f"not a complete zip archive of torch.save ({shown(str(error))}); {why}") from error
        names = self._zip.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            _refuse(f"{len(pickles)} pickles in the archive, or a name twice")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in names and self.member("byteorder", 16) != b"little":
            _refuse("not in little-endian byte order")
        self.pickle = self.member("data.pkl", LARGEST_FILE)

    def member(self, name: str, limit: int) -> bytes:
        """The content of a file in the archive, of at most ``limit`` bytes."""
        try:
            info = self._zip.getinfo(f"{self._root}{name}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
                _refuse(f"{shown(name)} in the archive is compressed, or has more than {limit:,} bytes")
            return self._zip.read(info)
        except KeyError as error:
            raise CardError(f"the archive lacks {shown(name)}; {_DAMAGED}") from error
        except _BAD_ZIP as error:
            raise CardError(f"the zip archive is damaged ({shown(str(error))}); {_DAMAGED}") from error


def _networks(found: Any, archive: _Archive) -> dict[str, Network]:
    if not isinstance(found, dict) or not found:
        _refuse("the pickle is not a dictionary of networks")
    if len(found) > MAX_BLOCKS:
        _refuse(f"{len(found):,} networks, at most {MAX_BLOCKS:,} are read")
    networks: dict[str, Network] = {}
    for name, module in found.items():
        networks[name] = _network(name, module, archive)
    dtypes = {tensor.dtype for network in networks.values() for tensor in network.values()}
    if len(dtypes) > 1:
        _refuse(f"weights in several dtypes ({', '.join(sorted(map(str, dtypes)))})")
    return networks


def _network(name: str, module: Any, archive: _Archive) -> Network:
    layers = list(_part(module, _SEQUENTIAL, "_modules", name).values())
    kinds = [layer.what if isinstance(layer, Note) else type(layer).__name__ for layer in layers[:4]]
    if kinds != [_LINEAR, _TANH, _LINEAR]:
        found = ", ".join(kind.rsplit(".", 1)[-1] for kind in kinds)
        _refuse(f"the network of {shown(name)} is {shown(found)}, expected Linear, Tanh, Linear")
    first, last = (_part(layers[i], _LINEAR, "_parameters", name) for i in (0, 2))
    if set(first) != {"weight", "bias"} or set(last) != {"weight", "bias"}:
        _refuse(f"a layer of {shown(name)} has other parameters than weight and bias")
    return {
        "w1": _tensor(first["weight"], (HIDDEN, INPUTS), name, archive),
        "b1": _tensor(first["bias"], (HIDDEN,), name, archive),
        "w2": _tensor(last["weight"], (1, HIDDEN), name, archive)[0],
        "b2": _tensor(last["bias"], (1,), name, archive)[0],
    }


def _part(module: Any, kind: str, attribute: str, name: str) -> dict[Any, Any]:
    """The dictionary ``attribute`` of a module of this ``kind``."""
    attributes = module.attributes if isinstance(module, Note) and module.what == kind else None
    part = attributes.get(attribute) if isinstance(attributes, dict) else None
    if not isinstance(part, dict):
        _refuse(f"the network of {shown(name)} is not a {kind.rsplit('.', 1)[-1]} with {attribute}")
    return part


def _tensor(parameter: Any, shape: tuple[int, ...], name: str, archive: _Archive) -> torch.Tensor:
    """The contiguous tensor of this ``shape`` that a note describes, from the bytes in the archive."""
    try:
        if parameter.what != _PARAMETER or parameter.arguments[0].what != _TENSOR:
            raise ValueError("not a parameter")
        storage, offset, size, stride = parameter.arguments[0].arguments[:4]
        if storage.what != "storage":
            raise ValueError("not a storage")
        kind, dtype_name, key, _, length = storage.arguments
        dtype = _STORAGES[dtype_name.text]
        numbers = torch.Size(shape).numel()
        if (kind, tuple(size), tuple(stride)) != ("storage", shape, torch.empty(shape, device="meta").stride()):
            raise ValueError(f"another shape than {list(shape)}, or not contiguous")
        if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= length - numbers):
            raise ValueError("beyond its storage")
        if not (isinstance(key, str) and key.isascii() and key.isalnum()):
            raise ValueError("a storage with an unexpected name")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CardError(
            f"a weight of {shown(name)} is not a weight of a tuner ({shown(str(error))}); {_DAMAGED}"
        ) from error
    content = archive.member(f"data/{key}", LARGEST_STORAGE)
    if len(content) != length * dtype.itemsize:
        _refuse(f"a weight of {shown(name)} has {len(content):,} bytes, expected {length * dtype.itemsize:,}")
    tensor = torch.frombuffer(bytearray(content), dtype=dtype)[offset : offset + numbers].reshape(shape).clone()
    if not bool(tensor.isfinite().all()):
        raise CardError(f"the network of {shown(name)} holds NaN or infinite numbers; its training diverged")
    return tensor


def _refuse(why: str) -> NoReturn:
    raise CardError(f"{why}; {_DAMAGED}")
