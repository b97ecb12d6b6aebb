"""Card: a tuner card as one safetensors file under 2 MB, checked in full when it is read or made."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from pydantic import ValidationError

from zoft.errors import CardError, printable, shown
from zoft.files import replacing
from zoft.registry.card.schema import FORMAT, TunerCard
from zoft.tuner.features import INPUTS
from zoft.weights.blocks import Block, architecture_hash

MAX_BYTES = 2_000_000
KEY = "zoft"
SAMPLES = 16  # weights sampled from each block of the base
_DTYPES = {"F16": torch.float16, "F32": torch.float32}
_LARGEST = 65504.0  # of float16
_UNLIKE = "expected a tuner card as `zoft metatrain` writes it"


def tensor_shapes(card: TunerCard) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of ``card``, by name: every level's networks, and the facts of the base.

    ``level{k}.w1`` (groups, hidden, 5), ``.b1`` and ``.w2`` (groups, hidden), ``.b2`` (groups,); unless the base
    hash is None, ``base.statistics`` (blocks, 2), mean and variance, and ``base.samples`` (blocks, 16).
    """
    hidden = card.network.hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for k, level in enumerate(card.network.levels):
        groups = len(level.groups)
        shapes[f"level{k}.w1"] = (groups, hidden, INPUTS)
        shapes[f"level{k}.b1"] = shapes[f"level{k}.w2"] = (groups, hidden)
        shapes[f"level{k}.b2"] = (groups,)
    if card.base.hash is not None:
        shapes["base.statistics"] = (len(card.blocks), 2)
        shapes["base.samples"] = (len(card.blocks), SAMPLES)
    return shapes


@dataclass(frozen=True, eq=False)
class Card:
    """A tuner card: its JSON (``metadata``) and its tensors by name (`tensor_shapes`), float16 or float32.

    zoft writes the networks' weights as float16; ``base.statistics`` is always float32. Everything is checked when a
    card is made, and `CardError` names the first fault. Cards with equal content have equal bytes and one `digest`, on
    every machine.

    >>> card = Card.load("smollm2.tuner.safetensors")  # doctest: +SKIP
    >>> card.metadata.recommended.lr  # doctest: +SKIP
    1e-05
    """

    metadata: TunerCard
    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        _check_tensors(self.metadata, self.tensors)
        if self.metadata.trainable.mode == "full":
            _check_architecture(self.metadata)

    @property
    def content(self) -> bytes:
        """The bytes of the card's file; `CardError` if they are 2 MB or more."""
        if not self.fits:
            raise CardError(_too_large(self.metadata, len(self._bytes)))
        return self._bytes

    @property
    def fits(self) -> bool:
        """Whether the file is smaller than 2 MB."""
        return len(self._bytes) < MAX_BYTES

    @cached_property
    def _bytes(self) -> bytes:
        # mode="json" and sorted keys: the bytes depend neither on the order of settings nor on that of tensors.
        text = json.dumps(self.metadata.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        return safetensors.torch.save(tensors, {KEY: text})

    @property
    def digest(self) -> str:
        """SHA-256 hex digest of the card's file."""
        return hashlib.sha256(self.content).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the card to ``path`` atomically."""
        content = self.content
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | Path) -> "Card":
        """Read and check the card in ``path``; `CardError` if it is not a card, damaged, too large or too new."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise CardError(f"{file} is not a file; expected a tuner card (*.tuner.safetensors)")
        try:
            with file.open("rb") as handle:
                content = handle.read(MAX_BYTES)  # bounded even if the file grows while it is read
        except OSError as error:
            raise CardError(f"{file} cannot be read: {error.strerror or error}") from error
        return cls.parse(content, printable(str(file)))

    @classmethod
    def parse(cls, content: bytes, source: str = "card") -> "Card":
        """Return the card in ``content``, called ``source`` in errors. Nothing in it is executed."""
        if len(content) >= MAX_BYTES:
            raise CardError(f"{source} has 2 MB or more, too large for a tuner card; {_UNLIKE}")
        try:
            header = _read_header(content)
            metadata = _read_metadata(header)
            _check_header(metadata, header)
            card = cls(metadata, safetensors.torch.load(content))
            card.content  # noqa: B018  # a card that cannot be written again is refused here, not where it is ranked
            return card
        except CardError as error:
            raise CardError(f"{source}: {error}") from error.__cause__
        except MemoryError:
            raise
        except Exception as error:  # whatever a value of the header makes the libraries raise
            why = shown(str(error) or type(error).__name__, 200)
            raise CardError(f"{source} is damaged ({why}); download or make it again") from error


def _read_header(content: bytes) -> dict[str, Any]:
    """The safetensors header: 8 bytes of length, then JSON. The library checks its offsets."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= length <= len(content) - 8:
        raise CardError("not a safetensors file, or cut short; download or make it again")
    header = _parse_json(content[8 : 8 + length], "the safetensors header")
    if not isinstance(header.get("__metadata__", {}), dict) or not all(isinstance(v, dict) for v in header.values()):
        raise CardError(f"the safetensors header is damaged; {_UNLIKE}")
    return header


def _parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CardError(f"{what} is not JSON; the file is damaged, download or make it again") from error
    if not isinstance(value, dict):
        raise CardError(f"{what} is not a JSON object; {_UNLIKE}")
    return value


def _read_metadata(header: dict[str, Any]) -> TunerCard:
    keys = header.get("__metadata__", {})
    if list(keys) != [KEY] or not isinstance(keys[KEY], str):
        raise CardError(f"expected the one metadata key {KEY!r}, found {shown(sorted(keys))}; {_UNLIKE}")
    version = _parse_json(keys[KEY], f"the metadata {KEY!r}").get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CardError(
            f"the card has format {shown(version)}, this zoft reads format {FORMAT}; update it (pip install -U zoft)"
        )
    try:
        return TunerCard.model_validate_json(keys[KEY], strict=True)
    except ValidationError as error:
        raise CardError(first_error(error)) from error


def _check_header(metadata: TunerCard, header: Mapping[str, Any]) -> None:
    """Compare the header with the tensors that ``metadata`` requires, before any of them is made."""
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    expected = tensor_shapes(metadata)
    _check_names(expected, found)
    for name, entry in found.items():
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not (isinstance(dtype, str) and dtype in _DTYPES) or shape != list(expected[name]):
            _wrong_tensor(name, expected[name], f"{dtype} {shape}")
        if extra := sorted(set(entry) - {"dtype", "shape", "data_offsets"}):
            raise CardError(f"{name} has the field {shown(extra[0])} in the safetensors header; {_UNLIKE}")


def _check_tensors(metadata: TunerCard, tensors: Mapping[str, torch.Tensor]) -> None:
    expected = tensor_shapes(metadata)
    _check_names(expected, tensors)
    for name, tensor in tensors.items():
        allowed = (torch.float32,) if name == "base.statistics" else tuple(_DTYPES.values())
        if tuple(tensor.shape) != expected[name] or tensor.dtype not in allowed:
            _wrong_tensor(name, expected[name], f"{tensor.dtype} {list(tensor.shape)}")
        if not bool(tensor.isfinite().all()):
            raise CardError(f"{name} holds NaN or infinite numbers; the card is damaged or its training diverged")
        if name.startswith("level") and bool((tensor.abs() > _LARGEST).any()):
            raise CardError(f"{name} holds weights beyond {_LARGEST:g}; the card is damaged or its training diverged")
    if "base.statistics" in tensors and bool((tensors["base.statistics"][:, 1] < 0).any()):
        raise CardError("base.statistics holds a negative variance; the card is damaged")


def _check_names(expected: Mapping[str, object], found: Mapping[str, object]) -> None:
    if missing := sorted(set(expected) - set(found)):
        raise CardError(f"the tensor {missing[0]} is missing ({len(missing)} in all); the card is damaged")
    if extra := sorted(set(found) - set(expected)):
        raise CardError(f"the tensor {shown(extra[0])} does not belong in this card ({len(extra)} in all); {_UNLIKE}")


def _wrong_tensor(name: str, expected: tuple[int, ...], found: str) -> NoReturn:
    raise CardError(
        f"{name} is {shown(found)}, expected float16 or float32 (base.statistics: float32) {list(expected)}; "
        "the tensors do not belong to the card's metadata"
    )


def _check_architecture(metadata: TunerCard) -> None:
    blocks = [
        Block(block.name, torch.nn.Parameter(torch.empty(block.shape, device="meta"))) for block in metadata.blocks
    ]
    if architecture_hash(blocks) != metadata.base.architecture_hash:
        raise CardError(
            f"the {len(blocks)} blocks of the card do not have its architecture hash "
            f"{metadata.base.architecture_hash[:16]}; blocks were added, removed or changed"
        )


def first_error(error: ValidationError) -> str:
    """Return the first fault as a sentence without control characters."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the card"
    found = "" if isinstance(first["input"], dict | TunerCard) else f", found {shown(first['input'])}"
    return f"{shown(place)}: {first['msg'].removeprefix('Value error, ')}{found}"


def _too_large(metadata: TunerCard, size: int) -> str:
    networks = sum(len(level.groups) for level in metadata.network.levels)
    return (
        f"the card would take {size:,} bytes, the limit is {MAX_BYTES:,}: {networks} networks of width "
        f"{metadata.network.hidden}; use fewer (--granularity layer or kind), a smaller width, or float16"
    )
