"""The file of a tuner card: fixed bytes, a whole round trip, and one clear error for every wrong input."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from zoft.errors import CardError, ZoftError
from zoft.registry import MAX_BYTES, Card, NetworkSpec, TunerCard, tensor_shapes

from .conftest import fractions, levels

GOLDEN = "75ed20345e8fce82350b43f06e0cd25a3d38d9967f7cd955ebbc2bd46c739dd4"


def rewritten(card: Card, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> bytes:
    """The bytes of ``card`` after ``change(text, tensors)``, as a careless or hostile writer would make them."""
    text = json.loads(card.metadata.model_dump_json())
    tensors = dict(card.tensors)
    change(text, tensors)
    return safetensors.torch.save(tensors, {"zoft": json.dumps(text)})


def test_golden_bytes(card: Card) -> None:
    assert hashlib.sha256(card.content).hexdigest() == card.digest == GOLDEN


def test_a_card_of_the_first_release_is_still_read() -> None:
    assert Card.load(Path(__file__).parent / "data" / "format-1.tuner.safetensors").digest == GOLDEN


def test_round_trip(card: Card, tmp_path: Path) -> None:
    card.save(tmp_path / "a.tuner.safetensors")
    read = Card.load(tmp_path / "a.tuner.safetensors")
    assert read.metadata == card.metadata
    assert read.tensors.keys() == card.tensors.keys()
    for name, tensor in card.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert read.content == (tmp_path / "a.tuner.safetensors").read_bytes()


def test_bytes_depend_on_content_alone(card: Card) -> None:
    """Not on the order of tensors, on that of settings, or on how a tensor lies in memory."""
    config = dict(reversed(card.metadata.training.config.items()))
    training = card.metadata.training.model_copy(update={"config": config})
    tensors = dict(reversed(card.tensors.items()))
    tensors["level0.w1"] = tensors["level0.w1"].transpose(0, 1).contiguous().transpose(0, 1)
    twin = Card(card.metadata.model_copy(update={"training": training}), tensors)
    assert twin.digest == card.digest
    tensors["level0.b2"] = tensors["level0.b2"] + 1
    assert Card(card.metadata, tensors).digest != card.digest


def test_one_metadata_key(card: Card) -> None:
    length = struct.unpack("<Q", card.content[:8])[0]
    assert list(json.loads(card.content[8 : 8 + length])["__metadata__"]) == ["zoft"]


def test_a_base_without_weights_has_no_base_tensors(card: Card) -> None:
    base = card.metadata.base.model_copy(update={"hash": None})
    metadata = card.metadata.model_copy(update={"base": base})
    assert not any(name.startswith("base.") for name in tensor_shapes(metadata))
    assert Card.parse(Card(metadata, fractions(metadata)).content).metadata.base.hash is None


def test_too_large_is_refused_on_save(card: Card, tmp_path: Path) -> None:
    wide = card.metadata.network.model_copy(update={"hidden": 1024})
    names = [f"layers.{i}.w" for i in range(400)]
    blocks = tuple(card.metadata.blocks[0].model_copy(update={"name": name}) for name in names)
    network = wide.model_copy(update={"levels": levels(names, "block")})
    trainable = card.metadata.trainable.model_copy(update={"mode": "lora"})
    metadata = card.metadata.model_copy(update={"network": network, "blocks": blocks, "trainable": trainable})
    with pytest.raises(CardError, match=r"5,\d\d\d,\d\d\d bytes, the limit is 2,000,000: 400 networks of width 1024"):
        Card(metadata, fractions(metadata)).save(tmp_path / "large")
    assert not list(tmp_path.iterdir())


def test_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as handle:
        handle.truncate(1 << 40)  # sparse: reading it whole would end the test, and the machine
    with pytest.raises(CardError, match="2 MB or more"):
        Card.load(tmp_path / "huge")


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def change(text: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        place: Any = text
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


def _tensor(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def change(text: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = to(tensors[name])

    return change


def _drop_block(text: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """A block goes from text and tensors alike: only the architecture hash can tell."""
    name = text["blocks"].pop()["name"]
    for level in text["network"]["levels"]:
        level["groups"] = [group for group in level["groups"] if group != name]
    tensors.update(fractions(TunerCard.model_validate(text)))


def _add_tensor(text: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["extra"] = torch.zeros(1)


WRONG = {
    "newer format": (_set("format", to=2), "has format 2, this zoft reads format 1; update"),
    "no format": (_set("format", to="x"), "format: .* found x"),
    "unknown field": (_set("colour", to="red"), "colour: Extra inputs are not permitted"),
    "NaN": (_tensor("level0.w1", lambda t: t.index_fill(0, torch.tensor([0]), torch.nan)), "level0.w1 holds NaN"),
    "infinite": (_tensor("base.samples", lambda t: t / 0), "base.samples holds NaN or infinite"),
    "absurd weights": (_tensor("level1.b2", lambda t: t.float() + 1e30), "level1.b2 holds weights beyond"),
    "negative variance": (_tensor("base.statistics", lambda t: t - 1), "negative variance"),
    "wrong shape": (_tensor("level1.w2", lambda t: t[:-1]), r"level1.w2 is F16 \[4, 4\], expected .* \[5, 4\]"),
    "wrong dtype": (_tensor("level1.w2", lambda t: t.double()), "level1.w2 is F64"),
    "half statistics": (_tensor("base.statistics", lambda t: t.half()), "base.statistics is torch.float16"),
    "extra tensor": (_add_tensor, "the tensor extra does not belong"),
    "missing tensor": (lambda text, tensors: tensors.pop("level0.b1"), "the tensor level0.b1 is missing"),
    "block dropped": (_drop_block, "the 4 blocks of the card do not have its architecture hash"),
    "block twice": (_set("blocks", 0, "name", to="norm.weight"), "block norm.weight is listed 2 times"),
    "block renamed": (_set("blocks", 0, "name", to="other"), "kind groups do not belong to the blocks"),
    "block reshaped": (_set("blocks", 0, "shape", to=[5, 3]), "do not have its architecture hash"),
    "block of zero weights": (_set("blocks", 0, "shape", to=[0, 3]), r"blocks.0.shape.0: .* found 0"),
    "huge block": (_set("blocks", 0, "shape", to=[2**30, 2**30]), r"more than 2\*\*45 weights"),
    "path in a block name": (_set("blocks", 0, "name", to="../../etc"), "blocks.0.name"),
    "escape in a block name": (_set("blocks", 0, "name", to="a\x1b[2J"), r"blocks.0.name: .* found a\\x1b\[2J"),
    "long block name": (_set("blocks", 0, "name", to="a" * 300), "blocks.0.name: .*at most 256"),
    "escape in a text": (_set("verdict", to="\x1b]0;owned\x07"), r"verdict: a control character, found \\x1b"),
    "escape in a setting": (_set("training", "config", to={"a": ["\x1b"]}), "training.config: a control character"),
    "deep settings": (_set("training", "config", to=json.loads('{"a":' * 9 + "1" + "}" * 9)), "8 deep"),
    "path in a file name": (_set("base", "files", 0, "name", to="../model"), "base.files.0.name"),
    "hidden file": (_set("base", "files", 0, "name", to="..\\x"), "base.files.0.name"),
    "newline in an id": (_set("base", "id", to="a\nb"), r"base.id: .* found a\\nb"),
    "short hash": (_set("base", "hash", to="abc"), "base.hash: .* found abc"),
    "NaN in the text": (_set("recommended", "lr", to=float("nan")), "recommended.lr"),
    "infinite setting": (_set("training", "config", to={"lr": 1e999}), "training.config"),
    "negative rate": (
        _set("recommended", "lr", to=-1.0),
        "recommended.lr: .* greater than or equal to 0.0+1, found -1.0",
    ),
    "absurd rate": (_set("recommended", "lr", to=0.2), "recommended.lr: .* less than or equal to 0.1, found 0.2"),
    "vanishing rate": (_set("recommended", "lr", to=1e-300), "recommended.lr: .* found 1e-300"),
    "absurd eps": (_set("recommended", "eps", to=3.0), "recommended.eps: .* less than or equal to 1, found 3.0"),
    "vanishing eps": (_set("recommended", "eps", to=1e-9), "recommended.eps: .* found 1e-09"),
    "text for a number": (_set("training", "steps", to="3"), "training.steps: .* found 3"),
    "strength of 2": (_set("network", "strength", to=2.0), "network.strength"),
    "huge width": (_set("network", "hidden", to=10**9), "network.hidden"),
    "three levels": (_set("network", "levels", to=[{"granularity": "layer", "groups": []}] * 3), "network.levels"),
    "no blocks": (_set("blocks", to=[]), "blocks: .* at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_one_clear_error(card: Card, case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(CardError, match=message) as caught:
        Card.parse(rewritten(card, change), "a.tuner.safetensors")
    text = str(caught.value)
    assert text.startswith("a.tuner.safetensors")
    assert text.isprintable() and len(text) < 400


def _with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


WRONG_FILES = {
    "empty": (b"", "cut short"),
    "not safetensors": (b"\x80\x04\x95" * 20, "not a safetensors file"),
    "header beyond the file": (struct.pack("<Q", 1 << 62) + b"{}", "cut short"),
    "no JSON": (_with_header(b"{]"), "the safetensors header is not JSON"),
    "nested JSON": (_with_header(b"[" * 100_000), "the safetensors header is not JSON"),
    "other safetensors": (safetensors.torch.save({"w": torch.zeros(2)}), "expected the one metadata key 'zoft'"),
    "more keys": (safetensors.torch.save({}, {"zoft": "{}", "x": ""}), "expected the one metadata key 'zoft'"),
    "text no JSON": (safetensors.torch.save({}, {"zoft": "{"}), "the metadata 'zoft' is not JSON"),
    "text a list": (safetensors.torch.save({}, {"zoft": "[]"}), "is not a JSON object"),
    "text empty": (safetensors.torch.save({}, {"zoft": "{}"}), "base: Field required"),
}


_HUNDRED: Any = []
for _ in range(100):
    _HUNDRED = [_HUNDRED]

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "2**63": 2**63,
    "10**400": 10**400,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "[]": [],
    "{}": {},
    "nested list": [[]],
    "nested object": {"a": {}},
    "text": "a" * 300,
    "100 levels": _HUNDRED,
    "surrogate": "\ud800",
    "negative shape": [-1, 2],
    "huge shape": [2**62, 2**62],
    "long": [0] * 100_000,
    "escape": "\x1b[2J",
    "BF16": "BF16",
    "other": "F64",
}


def with_header(card: Card, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The bytes of ``card`` with another safetensors header before the same tensors."""
    (length,) = struct.unpack("<Q", card.content[:8])
    header = json.loads(card.content[8 : 8 + length])
    change(header)
    return _with_header(json.dumps(header).encode()) + card.content[8 + length :]


@pytest.mark.parametrize("place", ["dtype", "shape", "data_offsets", "further", "entry", "__metadata__", "zoft"])
@pytest.mark.parametrize("value", VALUES)
def test_any_value_in_the_header_is_one_clear_error(card: Card, place: str, value: str) -> None:
    """``"dtype": []`` was a TypeError: a list is no key of a table."""

    def change(header: dict[str, Any]) -> None:
        if place == "__metadata__":
            header[place] = VALUES[value]
        elif place == "zoft":
            header["__metadata__"][place] = VALUES[value]
        elif place == "entry":
            header["level0.w1"] = VALUES[value]
        else:
            header["level0.w1"][place] = VALUES[value]

    with pytest.raises(CardError) as caught:
        Card.parse(with_header(card, change), "a.tuner.safetensors")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("offsets", [[0, 8], [8, 0], [0, 2**40], [0], [0, 1, 2], ["0", "1"]])
def test_wrong_offsets(card: Card, offsets: list[Any]) -> None:
    with pytest.raises(CardError):
        Card.parse(with_header(card, lambda header: header["level0.w1"].update(data_offsets=offsets)))


def test_ten_megabytes_of_json() -> None:
    with pytest.raises(CardError, match="2 MB or more"):
        Card.parse(_with_header(b"[" * 10_000_000))


def test_a_card_that_would_be_too_large_to_write_is_refused_where_it_is_read(card: Card) -> None:
    """Three bytes of a text become six: `rank` asked for the digest, and one such card ended the search."""
    tasks = ["\u4e2d" * 256] * 1900

    def change(header: dict[str, Any]) -> None:
        text = json.loads(header["__metadata__"]["zoft"])
        text["training"]["tasks"] = tasks
        header["__metadata__"]["zoft"] = json.dumps(text, ensure_ascii=False)

    (length,) = struct.unpack("<Q", card.content[:8])
    header = json.loads(card.content[8 : 8 + length])
    change(header)
    content = _with_header(json.dumps(header, ensure_ascii=False).encode()) + card.content[8 + length :]
    assert len(content) < MAX_BYTES
    with pytest.raises(CardError, match="the limit is 2,000,000"):
        Card.parse(content)


def test_a_library_that_raises_anything_is_one_clear_error(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors.torch, "load", lambda content: {}["nowhere"])
    with pytest.raises(CardError, match="a is damaged"):
        Card.parse(card.content, "a")


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files(case: str, tmp_path: Path) -> None:
    content, message = WRONG_FILES[case]
    (tmp_path / "card").write_bytes(content)
    with pytest.raises(CardError, match=message):
        Card.load(tmp_path / "card")


def test_every_truncation_is_refused(card: Card) -> None:
    for length in range(0, len(card.content), 37):
        with pytest.raises(CardError, match=r"cut short|damaged"):
            Card.parse(card.content[:length])


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="is not a file; expected a tuner card"):
        Card.load(tmp_path)


def test_groups_must_be_those_of_the_blocks(card: Card) -> None:
    text = card.metadata.model_dump()
    text["network"]["levels"][1]["groups"] = text["network"]["levels"][1]["groups"][::-1]
    with pytest.raises(ValidationError, match="block groups do not belong to the blocks: 5, in another order"):
        TunerCard.model_validate(text)


def test_schema_is_frozen(card: Card) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        card.metadata.network.strength = 0.5
    with pytest.raises(ValidationError, match="hidden"):
        NetworkSpec(levels=card.metadata.network.levels, inputs="raw", activation="abs", hidden=0, recurrent="s")


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_end_in_a_card_or_a_zoft_error(card: Card, data: st.DataObject) -> None:
    content = bytearray(card.content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"[", b"9" * 30, b"\\ud800", b"NaN"]))
        )
        content[at : at + data.draw(st.integers(0, 8))] = piece
    try:
        read = Card.parse(bytes(content))
    except ZoftError as error:
        assert str(error).isprintable()
    else:
        assert len(read.content) < MAX_BYTES
