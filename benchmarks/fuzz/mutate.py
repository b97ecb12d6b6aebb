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


def damage(content: bytes, draw: random.Random) -> bytes:
    """Return ``content`` with one to four places overwritten, lengthened or cut."""
    mutated = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(mutated) + 1)
        piece = draw.choice(PIECES) if draw.random() < 0.5 else draw.randbytes(draw.randint(0, 4))
        mutated[at : at + draw.choice((0, 1, 4, 8, len(mutated) if draw.random() < 0.1 else 2))] = piece
    return bytes(mutated)


def damage_value(value: Any, draw: random.Random) -> Any:
    """Return JSON ``value`` with something inside of it replaced, removed, doubled or added."""
    if draw.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return draw.choice(VALUES)
    if isinstance(value, dict):
        key = draw.choice(list(value))
        match draw.randrange(8):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, str(draw.choice(VALUES))[:300]: draw.choice(VALUES)}
            case _:
                return {**value, key: damage_value(value[key], draw)}
    at = draw.randrange(len(value))
    match draw.randrange(6):
        case 0:
            return value[:at] + value[at + 1 :]
        case 1:
            return [*value, value[at]]
        case _:
            return [*value[:at], damage_value(value[at], draw), *value[at + 1 :]]


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
