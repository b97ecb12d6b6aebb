"""Damage valid files: random bytes, and changed values inside a file with correct checksums."""

import io
import json
import random
import zipfile
import zlib
from typing import Any

import safetensors.torch
import torch

from zoft.registry.card.file import KEY, Card

PIECES = [b'"', b"[", b"{", b"9" * 30, b"\\ud800", b"NaN", b"Infinity", b"-1", b"1e999", b"null", b"\x00", b"\xff" * 4]
VALUES: list[Any] = [
    *(None, True, -1, 0, 2**63, 10**400, 1e308, -0.0, float("nan"), float("inf"), [], {}, [[]], {"a": {}}, "a" * 300),
    *("", "\x1b[2J", "../../etc/passwd", "nan", "\ud800", "a\nb", "x" * 5000, [0] * 1000, {"k": [1]}),
]


NESTED: list[Any] = [[]]
for _ in range(98):
    NESTED = [NESTED]  # as deep as JSON may be before readers differ
HEADER_VALUES: list[Any] = [
    *VALUES,
    *(
        NESTED,
        {"a": NESTED},
        [-1, 2],
        [2**62, 2**62],
        [1.5],
        ["1"],
        [True],
        [[1]],
        2**1000,
        -(2**70),
        "F16 ",
        "F64",
        "BF16",
    ),
    *("x" * 100_000, [0] * 20_000, {str(i): i for i in range(2000)}, "<!-- zoft: end -->", "$(x)", "a/b; x", "0.1"),
]


def damage(content: bytes, draw: random.Random) -> bytes:
    """Return ``content`` with one to four places overwritten, lengthened or cut."""
    mutated = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(mutated) + 1)
        piece = draw.choice(PIECES) if draw.random() < 0.5 else draw.randbytes(draw.randint(0, 4))
        mutated[at : at + draw.choice((0, 1, 4, 8, len(mutated) if draw.random() < 0.1 else 2))] = piece
    return bytes(mutated)


def damage_value(value: Any, draw: random.Random, values: list[Any] = VALUES) -> Any:
    """Return JSON ``value`` with something inside of it replaced (by one of ``values``), removed, doubled or added."""
    if draw.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return draw.choice(values)
    if isinstance(value, dict):
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, str(draw.choice(VALUES))[:300]: draw.choice(values)}
            case _:
                return {**value, key: damage_value(value[key], draw, values)}
    at = draw.randrange(len(value))
    match draw.randrange(6):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return [*value, value[at]]
        case _:
            return [*value[:at], damage_value(value[at], draw, values), *value[at + 1 :]]


def damaged_card(card: Card, draw: random.Random) -> bytes:
    """Return the bytes of ``card`` after a change that a writer could have made: in its text, or in its tensors."""
    if draw.random() < 0.4:
        return damage(card.content, draw)
    text, tensors = json.loads(card.metadata.model_dump_json()), dict(card.tensors)
    if draw.random() < 0.7:
        text = damage_value(text, draw)
    else:
        tensors = _damaged_tensors(tensors, draw)
    return safetensors.torch.save(tensors, {KEY: json.dumps(text)})


def damaged_header(card: Card, draw: random.Random) -> bytes:
    """Return the bytes of ``card`` with other values in its header: types, nesting and sizes; the tensors stay.

    One to three values are changed, in the entries of tensors, in the metadata, or in the JSON that these hold.
    """
    length = int.from_bytes(card.content[:8], "little")
    header = json.loads(card.content[8 : 8 + length])
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        text = metadata.get(KEY) if isinstance(metadata, dict) else None
        match draw.randrange(4):
            case 0 | 1 if isinstance(text, str):
                header = {**header, "__metadata__": {**metadata, KEY: _damaged_text(text, draw)}}
            case 2 if isinstance(header, dict) and len(header) > 1:
                name = draw.choice([name for name in header if name != "__metadata__"])
                header = {**header, name: damage_value(header[name], draw, HEADER_VALUES)}
            case _:
                header = damage_value(header, draw, HEADER_VALUES)
    encoded = json.dumps(header, ensure_ascii=draw.random() < 0.9).encode(errors="surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + card.content[8 + length :]


def _damaged_text(text: str, draw: random.Random) -> str:
    """The JSON of a card with one value changed: often a single leaf, so that readers get as far as they can."""
    try:
        value = json.loads(text)
    except ValueError:  # one of ``HEADER_VALUES``
        return text
    if draw.random() < 0.5:
        return json.dumps(damage_value(value, draw, HEADER_VALUES))
    place: Any = value
    while True:
        inner = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not inner:
            return json.dumps(value)
        key = draw.choice(inner)
        if not isinstance(place[key], dict | list) or not place[key]:
            like = [one for one in HEADER_VALUES if type(one) is type(place[key])] if draw.random() < 0.6 else []
            place[key] = draw.choice(like or HEADER_VALUES)
            return json.dumps(value)
        place = place[key]


def _damaged_tensors(tensors: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    name = draw.choice(list(tensors))
    tensor = tensors[name].clone()
    match draw.randrange(5):
        case 0:
            tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice((torch.nan, torch.inf, -1.0, 6e4))
        case 1:
            tensor = tensor.to(draw.choice((torch.float64, torch.bfloat16, torch.int8, torch.float32)))
        case 2:
            tensor = tensor.reshape(-1)
        case 3:
            tensor = torch.zeros(draw.choice(((0,), (1,), (2, 3, 4, 5), (1, 1, 1, 1, 1, 1, 1, 1, 1, 1))))
        case _:
            return {draw.choice(("../x", "a" * 300, "\x1b", "level9.w1")): tensors.pop(name), **tensors}
    return {**tensors, name: tensor}


def damaged_journal(content: bytes, draw: random.Random) -> bytes:
    """Return a journal with bytes at random, or with a value in one of its lines and all checksums correct."""
    if draw.random() < 0.3:
        return damage(content, draw)
    payloads = [line[9:] for line in content.splitlines()]
    at = draw.randrange(len(payloads))
    match draw.randrange(5):
        case 0:
            payloads.insert(draw.randrange(len(payloads) + 1), payloads[at])
        case 1:
            del payloads[at]
        case 2:
            payloads[at] = damage(payloads[at], draw).replace(b"\n", b" ")
        case _:
            payloads[at] = json.dumps(damage_value(json.loads(payloads[at]), draw)).encode()
    return chained(payloads)


def chained(payloads: list[bytes]) -> bytes:
    """Return the journal with these lines."""
    checksum, lines = 0, []
    for payload in payloads:
        checksum = zlib.crc32(payload, checksum)
        lines.append(b"%08x %s\n" % (checksum, payload))
    return b"".join(lines)


def damaged_pickle(content: bytes, draw: random.Random) -> bytes:
    """Return a file of torch.save with bytes at random, or with another pickle in a sound archive."""
    if draw.random() < 0.3:
        return damage(content, draw)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, damage(part, draw) if name.endswith("data.pkl") or draw.random() < 0.02 else part)
    return buffer.getvalue()
