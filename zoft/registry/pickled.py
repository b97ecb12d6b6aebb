"""The authors' released tuners (arXiv 2510.00419), read from their pickles without running one.

A pickle is a program for a stack machine that may call anything. Here its instructions are read one by one. Those
that a tuner needs push plain values and inert notes of what they would build; nothing is imported and nothing called,
and any other instruction or name ends the reading. What is left has to be a dictionary of block name ->
``Sequential(Linear(5, 64), Tanh(), Linear(64, 1))`` in float32 or float16.
"""

import io
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from zoft.errors import CardError, shown
from zoft.pertnn import INPUTS
from zoft.registry.schema import MAX_BLOCKS

HIDDEN = 64
LARGEST_FILE = 64_000_000  # bytes; the largest released tuner, of 772 blocks, has 2.8 MB
LARGEST_STORAGE = 1 << 16  # bytes of one weight; it may be asked for many times
MOST_INSTRUCTIONS = 10_000_000
_MARK = object()
_STORAGES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16}
_SEQUENTIAL, _LINEAR, _TANH = (
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.activation.Tanh",
)
_PARAMETER, _TENSOR = "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"
_DICT, _SETS = "collections.OrderedDict", ("__builtin__.set", "builtins.set")
_KNOWN = {*_STORAGES, _SEQUENTIAL, _LINEAR, _TANH, _PARAMETER, _TENSOR, _DICT, *_SETS}
_DAMAGED = "expected a tuner as the authors released it, saved by torch.save"
_BAD_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError, OverflowError)

Network = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; never looked up."""

    text: str


@dataclass
class _Note:
    """What the pickle would have built: what, of which arguments, with which attributes."""

    what: str
    arguments: tuple[Any, ...]
    attributes: Any = None


def read_pickled(path: Path) -> dict[str, Network]:
    """Return the networks in ``path`` by block: ``w1`` (64, 5), ``b1`` and ``w2`` (64,), ``b2`` (), in their dtype.

    Raises:
        CardError: no such file, or one that holds or does anything else; it says what, and nothing was run.
    """
    if not path.is_file():
        raise CardError(f"{path} is no file; expected a tuner as the authors released it (*.pth)")
    with path.open("rb") as handle:
        content = handle.read(LARGEST_FILE)
    if len(content) >= LARGEST_FILE:
        raise CardError(f"{path} has {LARGEST_FILE // 10**6} MB or more, which no tuner has")
    try:
        archive = _Archive(content)
        return _networks(_read(archive.pickle), archive)
    except CardError as error:
        raise CardError(f"{path}: {error}") from error.__cause__


class _Archive:
    """The zip file that torch.save writes: one pickle, and the bytes of every tensor, not compressed."""

    def __init__(self, content: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(content))
        except _BAD_ZIP as error:
            why = "files of torch before 1.6 and plain pickles are not read"
            raise CardError(f"no whole zip archive of torch.save ({shown(str(error))}); {why}") from error
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


# -- the stack machine ------------------------------------------------------------------------------------------------


def _read(program: bytes) -> Any:
    """What the pickle ``program`` leaves behind, with notes in place of objects."""
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if count >= MOST_INSTRUCTIONS:
                _refuse("more instructions than any tuner needs")
            if opcode.name == "STOP":
                return machine.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                _refuse(f"the pickle uses the instruction {opcode.name}, which no tuner needs")
            step(machine, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CardError(f"the pickle is damaged ({shown(str(error))}); {_DAMAGED}") from error
    return _refuse("the pickle does not end")


class _Machine:
    """Stack and memory of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def pop(self) -> Any:
        """Take the topmost value."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def since_mark(self) -> list[Any]:
        """Take all values above the last mark, and the mark."""
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self.stack.append(value)

    def remember(self, key: int) -> None:
        """Keep the topmost value under ``key``."""
        self.memory[key] = self.stack[-1]

    def tuple_of(self, length: int) -> None:
        """Make one tuple of the topmost values."""
        values = [self.pop() for _ in range(length)]
        self.push(tuple(values[::-1]))

    def set_items(self, pairs: list[Any]) -> None:
        """Put keys and values, one after the other, into the topmost dictionary."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items for what is no dictionary")
        if not all(isinstance(key, str) for key in pairs[::2]):  # to hash a nest of tuples could end the process
            raise ValueError("a key that is no text")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append(self, values: list[Any]) -> None:
        """Append ``values`` to the topmost list."""
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for what is no list")
        self.stack[-1].extend(values)

    def name(self, module: Any, name: Any) -> None:
        """Note a class or function, if a tuner has it."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        text = f"{module}.{name}"
        if text not in _KNOWN:
            raise CardError(
                f"the pickle asks for {shown(text)}, which is no part of a tuner: a pickle can run any program, so it "
                "was refused, and nothing of it was run"
            )
        self.push(_Name(text))

    def call(self) -> None:
        """Note what a call would have built."""
        arguments, what = self.pop(), self.pop()
        if not isinstance(what, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no function")
        if what.text == _DICT and not arguments:
            self.push({})
        else:
            self.push(_Note(what.text, arguments))

    def attributes(self) -> None:
        """Note the attributes of the topmost object."""
        attributes = self.pop()
        if not isinstance(self.stack[-1], _Note) or self.stack[-1].attributes is not None:
            raise ValueError("attributes for what is no object")
        self.stack[-1].attributes = attributes

    def stored(self) -> None:
        """Note a reference to the bytes of a tensor."""
        self.push(_Note("storage", self.pop()))


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.push(value() if callable(value) else value)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        lambda machine, argument: machine.push(argument),
    ),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, argument: machine.remember(argument)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, argument: machine.push(machine.memory[argument])),
    "MEMOIZE": lambda machine, argument: machine.remember(len(machine.memory)),
    "MARK": lambda machine, argument: machine.push(_MARK),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    "APPEND": lambda machine, argument: machine.append([machine.pop()]),
    "APPENDS": lambda machine, argument: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, argument: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, argument: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, argument: machine.name(*[machine.pop(), machine.pop()][::-1]),
    "REDUCE": lambda machine, argument: machine.call(),
    "NEWOBJ": lambda machine, argument: machine.call(),
    "BUILD": lambda machine, argument: machine.attributes(),
    "BINPERSID": lambda machine, argument: machine.stored(),
}


# -- from notes to networks -------------------------------------------------------------------------------------------


def _networks(found: Any, archive: _Archive) -> dict[str, Network]:
    if not isinstance(found, dict) or not found:
        _refuse("the pickle holds no dictionary of networks")
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
    kinds = [layer.what if isinstance(layer, _Note) else type(layer).__name__ for layer in layers[:4]]
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
    attributes = module.attributes if isinstance(module, _Note) and module.what == kind else None
    part = attributes.get(attribute) if isinstance(attributes, dict) else None
    if not isinstance(part, dict):
        _refuse(f"the network of {shown(name)} is no {kind.rsplit('.', 1)[-1]} with {attribute}")
    return part


def _tensor(parameter: Any, shape: tuple[int, ...], name: str, archive: _Archive) -> torch.Tensor:
    """The contiguous tensor of this ``shape`` that a note describes, from the bytes in the archive."""
    try:
        if parameter.what != _PARAMETER or parameter.arguments[0].what != _TENSOR:
            raise ValueError("no parameter")
        storage, offset, size, stride = parameter.arguments[0].arguments[:4]
        if storage.what != "storage":
            raise ValueError("no storage")
        kind, dtype_name, key, _, length = storage.arguments
        dtype = _STORAGES[dtype_name.text]
        numbers = torch.Size(shape).numel()
        if (kind, tuple(size), tuple(stride)) != ("storage", shape, torch.empty(shape, device="meta").stride()):
            raise ValueError(f"another shape than {list(shape)}, or not contiguous")
        if not (isinstance(offset, int) and isinstance(length, int) and 0 <= offset <= length - numbers):
            raise ValueError("beyond its storage")
        if not (isinstance(key, str) and key.isascii() and key.isalnum()):
            raise ValueError("a storage with an odd name")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CardError(
            f"a weight of {shown(name)} is none that a tuner has ({shown(str(error))}); {_DAMAGED}"
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
