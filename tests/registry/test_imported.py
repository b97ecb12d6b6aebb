"""Tuners that the authors released become cards; a pickle that would do anything else is refused, and not run."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zoft
from zoft.errors import CardError
from zoft.model.fingerprint import base_hash
from zoft.registry import Card, LocalStore, import_tuner, load, read_released, save_new, unpack
from zoft.registry.released.convert import beyond_start
from zoft.tuner.features import Recurrent
from zoft.weights.blocks import architecture_hash, statistics, trainable_blocks

from ..hub import StandIn

Modules = dict[str, torch.nn.Sequential]


def network(hidden: int = 64) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(5, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1))


def released(names: list[str], dtype: torch.dtype = torch.float32) -> Modules:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {name: network().to(dtype) for name in names}


def content_of(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def with_pickle(program: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return buffer.getvalue()


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    return model_folder.rename(tmp_path / "tiny-base")


@pytest.fixture
def names(tiny_model) -> list[str]:
    return [block.name for block in trainable_blocks(tiny_model("llama"))]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[object], Path]:
    """Save anything as the authors do, or bytes as they are."""

    def save(thing: object) -> Path:
        (tmp_path / "tuner.pth").write_bytes(thing if isinstance(thing, bytes) else content_of(thing))
        return tmp_path / "tuner.pth"

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_networks_of_the_card_compute_what_the_modules_do(base, names, saved, dtype) -> None:
    modules = released(names, dtype)
    card, notes = import_tuner(saved(modules), str(base))
    assert notes == []
    assert card.tensors["level0.w1"].dtype == dtype
    metadata = card.metadata
    network = metadata.network
    assert (network.inputs, network.activation, network.recurrent, network.strength) == ("raw", "abs", "sigma", 1.0)
    assert [level.granularity for level in network.levels] == ["block"]
    facts = torch.rand(len(names), 2, dtype=torch.float64)
    before = Recurrent(0.7, 0.5, torch.linspace(0.5, 2, len(names), dtype=torch.float64))
    sigma = unpack(card)(facts, before)
    for i, name in enumerate(names):
        inputs = torch.tensor([*facts[i], 0.7, 0.5, before.scales[i]], dtype=torch.float32)
        torch.testing.assert_close(sigma[i], modules[name].float()(inputs).abs()[0], rtol=1e-5, atol=1e-6)


def test_the_card_says_where_it_came_from_and_how_far_it_got(base, names, saved) -> None:
    modules = released(names)
    with torch.no_grad():
        modules[names[4]][2].weight[0, 7] = 0.25  # twice 1 / sqrt(64)
    file = saved(modules)
    card, _ = import_tuner(file, str(base))
    metadata = card.metadata
    assert metadata.base.id == "tiny-base" and metadata.base.hash == base_hash(base)
    assert metadata.training.config["form"] == "paper"
    assert metadata.training.config["imported"]["file"] == "tuner.pth"
    assert metadata.training.config["imported"]["size"] == file.stat().st_size
    distances = metadata.training.config["largest_over_initial_bound"]
    assert distances[4] == 2 and sum(distance > 1 for distance in distances) == 1 and min(distances) > 0.8
    assert metadata.verdict.startswith(f"imported, not tested: 1 of {len(names)} blocks have left the range")
    assert f"{names[4]}, is at 2 times" in metadata.verdict
    model = zoft.load(base, device="cpu").model
    torch.testing.assert_close(card.tensors["base.statistics"], statistics(trainable_blocks(model)).float())
    assert Card.parse(card.content).digest == card.digest


def test_an_imported_card_drives_the_model(base, names, saved, tmp_path) -> None:
    card, _ = import_tuner(saved(released(names)), str(base))
    save_new(card, tmp_path / "a.tuner.safetensors")
    model = zoft.load(base, device="cpu").model
    assert load(tmp_path / "a.tuner.safetensors", model, folder=base).match.kind == "same base"
    with pytest.raises(CardError, match="exists already, and a card is never rewritten"):
        save_new(card, tmp_path / "a.tuner.safetensors")


def test_a_base_with_a_configuration_only(base, names, saved, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    file = saved(released(names))
    card, notes = import_tuner(file, str(bare))
    assert card.metadata.base.hash is None and not any(name.startswith("base.") for name in card.tensors)
    whole, _ = import_tuner(file, str(base))
    assert card.metadata.base.architecture_hash == whole.metadata.base.architecture_hash
    assert card.metadata.blocks == whole.metadata.blocks and whole.metadata.base.hash == base_hash(base)
    assert len(notes) == 1 and "known by its configuration alone" in notes[0]


def test_a_base_on_the_hub_is_not_downloaded(base, names, saved, hub: StandIn) -> None:
    hub.put("org/base", {file.name: file.read_bytes() for file in base.iterdir()})
    card, _ = import_tuner(saved(released(names)), "org/base")
    assert (card.metadata.base.id, card.metadata.base.hash) == ("org/base", None)
    assert [r for r in hub.requests if r.startswith("GET /org")] == ["GET /org/base/resolve/main/config.json"]
    loaded = zoft.load("org/base", device="cpu")
    hub.requests.clear()
    assert load("auto", loaded.model, store=_store_with(card)).match.kind == "declared"
    whole, _ = import_tuner(saved(released(names)), "org/base")
    assert whole.metadata.base.hash == base_hash(loaded.path), "now that the weights are here"


def _store_with(card: Card):
    store = LocalStore()
    store.add(card)
    return store


def test_blocks_must_be_those_of_the_base(base, names, saved) -> None:
    few = released(names[1:])
    with pytest.raises(CardError, match=rf"does not belong to .*no network for 1 of its {len(names)} blocks"):
        import_tuner(saved(few), str(base))
    with pytest.raises(CardError, match=r"1 networks for blocks it does not have \(other.weight\); name the model"):
        import_tuner(saved(released([*names, "other.weight"])), str(base))


@pytest.mark.parametrize(
    ("layers", "dtype", "granularity", "kept", "note"),
    [
        (100, torch.float32, "block", torch.float32, ""),
        (150, torch.float32, "block", torch.float16, "rounded to float16"),
        (300, torch.float16, "layer", torch.float16, "one network per layer, that of its largest block"),
    ],
)
def test_what_is_too_large_is_rounded_then_shared(tiny_model, saved, tmp_path, layers, dtype, granularity, kept, note):
    folder = tmp_path / "deep"
    model = tiny_model("llama", num_hidden_layers=layers, hidden_size=8, intermediate_size=16, num_attention_heads=2)
    model.config.save_pretrained(folder)
    names = [block.name for block in trainable_blocks(model)]
    modules = released(names, dtype)
    card, notes = import_tuner(saved(modules), str(folder))
    assert card.tensors["level0.w1"].dtype == kept and len(card.content) < 2_000_000
    (level,) = card.metadata.network.levels
    assert level.granularity == granularity
    assert notes[1:] == [one for one in notes if note and note in one][: len(notes) - 1]
    if granularity == "layer":
        row = level.groups.index("model.layers.5")
        largest = "model.layers.5.mlp.gate_proj.weight"
        assert torch.equal(card.tensors["level0.w1"][row], modules[largest][0].weight.detach().to(kept))


def test_beyond_start_reaches_one_at_the_bound() -> None:
    assert beyond_start({"w1": torch.tensor([5**-0.5]), "w2": torch.tensor([0.0])}) == pytest.approx(1)


class Evil:
    """Runs ``command`` where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_a_command_does_not(saved, tmp_path: Path) -> None:
    """Planted in every place of a tuner that a pickle can put it; the message names the function."""
    ran = tmp_path / "ran"
    evil = Evil(f"touch {ran}")
    planted = network()
    planted.training = evil
    asked = r"asks for posix.system, which is not part of a tuner: a pickle can run any program, so it was refused"
    for thing in (evil, {"a": evil}, {"a": network(), "b": evil}, [network(), evil], {"a": planted}):
        with pytest.raises(CardError, match=asked):
            read_released(saved(thing))
    assert not ran.exists()
    pickle.loads(pickle.dumps(evil))
    assert ran.exists(), "the very same thing does run where it is unpickled"


PROGRAMS = {
    "eval": (b"c__builtin__\neval\n(V1\ntR.", "asks for __builtin__.eval"),
    "import by torch": (b"ctorch.hub\nload\n.", "asks for torch.hub.load"),
    "another module of torch": (b"ctorch.nn.modules.linear\nBilinear\n.", "asks for torch.nn.modules.linear.Bilinear"),
    "name from the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
    "instance": (b"(i__builtin__\neval\n.", "instruction INST, which no tuner needs"),
    "extension": (b"\x82\x01.", "instruction EXT1"),
    "old persistent id": (b"Pevil\n.", "instruction PERSID"),
    "buffer": (b"\x97.", "instruction NEXT_BUFFER"),
    "huge memory index": (b"Nr\xff\xff\xff\x7f.", "not a dictionary of networks"),
    "missing memory": (b"h\x07.", "the pickle is damaged"),
    "huge announced text": (b"X\xff\xff\xff\x7fabc.", "the pickle is damaged"),
    "empty": (b".", "the pickle is damaged"),
    "no end": (b"N", "the pickle is damaged|does not end"),
    "mark at the end": (b"(.", "the pickle is damaged"),
    "call of a text": (b"Va\n.", "instruction UNICODE"),
    "nested tuples as a key": (b"}" + b"N" + b"\x85" * 1_000_000 + b"Ns.", "a key that is not text"),
    "a list in itself": (b"]q\x00h\x00a.", "not a dictionary of networks"),
    "empty dictionary": (b"}.", "not a dictionary of networks"),
    "a dictionary of numbers": (b"}X\x01\x00\x00\x00aK\x01s.", "the network of a is not a Sequential with _modules"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_other_programs_are_refused(saved, case: str) -> None:
    program, message = PROGRAMS[case]
    with pytest.raises(CardError, match=message) as caught:
        read_released(saved(with_pickle(program)))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def _spoil(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Linear):
        module.bias.fill_(torch.nan)


THINGS = {
    "state dict": (lambda: dict(network().state_dict()), "is not a Sequential with _modules"),
    "relu": (lambda: {"a": torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.ReLU())}, "asks for .*ReLU"),
    "deeper": (lambda: {"a": torch.nn.Sequential(*network(), torch.nn.Tanh())}, "is Linear, Tanh, Linear, Tanh, exp"),
    "wider": (lambda: {"a": network(65)}, r"another shape than \[64, 5\], or not contiguous"),
    "a list": (lambda: [network()], "not a dictionary of networks"),
    "double": (lambda: {"a": network().double()}, "asks for torch.DoubleStorage"),
    "mixed": (lambda: {"a": network(), "b": network().half()}, "weights in several dtypes"),
    "no bias": (
        lambda: {"a": torch.nn.Sequential(torch.nn.Linear(5, 64, bias=False), torch.nn.Tanh(), torch.nn.Linear(64, 1))},
        "is not a weight of a tuner",
    ),
    "NaN": (lambda: {"a": network().requires_grad_(False).apply(_spoil)}, "NaN or infinite"),
}


@pytest.mark.parametrize("case", THINGS)
def test_other_things_are_refused(saved, case: str) -> None:
    make, message = THINGS[case]
    with pytest.raises(CardError, match=message):
        read_released(saved(make()))


def test_other_files_are_refused(saved, tmp_path: Path) -> None:
    with pytest.raises(CardError, match="is not a file; expected a tuner"):
        read_released(tmp_path / "absent.pth")
    for content in (b"", b"PK\x03\x04", pickle.dumps({"a": 1}), b"x" * 1000):
        with pytest.raises(CardError, match=r"not a complete zip archive of torch.save"):
            read_released(saved(content))
    with (tmp_path / "tuner.pth").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CardError, match="64 MB or more, too large for a tuner"):
        read_released(tmp_path / "tuner.pth")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N" * 50_000_000)  # 50 kB that would become 50 MB
    with pytest.raises(CardError, match="is compressed"):
        read_released(saved(buffer.getvalue()))


def test_a_storage_elsewhere_is_refused(saved) -> None:
    whole = content_of({"a": network()})
    for old, new in ((b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00."), (b"\x4d\x40\x01", b"\x4d\xff\xff")):
        assert old in whole
        with pytest.raises(CardError):
            read_released(saved(whole.replace(old, new)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_end_in_networks_or_a_card_error(tmp_path_factory, data: st.DataObject) -> None:
    whole = content_of(released(["a", "b"]))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    program = bytearray(parts["archive/data.pkl"])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(program) - 1))
        program[at : at + data.draw(st.integers(0, 6))] = data.draw(st.binary(max_size=4))
    file = tmp_path_factory.getbasetemp() / "mutated.pth"
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (parts | {"archive/data.pkl": bytes(program)}).items():
            archive.writestr(name, content)
    try:
        networks = read_released(file)
    except CardError as error:
        assert str(error).isprintable()
    else:
        assert all(network["w1"].shape == (64, 5) for network in networks.values())


def test_the_architecture_hash_is_that_of_the_model(base, names, saved, tiny_model) -> None:
    card, _ = import_tuner(saved(released(names)), str(base))
    assert card.metadata.base.architecture_hash == architecture_hash(trainable_blocks(tiny_model("llama")))


def test_an_archive_of_several_disks_is_refused(saved) -> None:
    """A damaged end of a zip file, which `zipfile.is_zipfile` answers with an exception: found by the fuzzer."""
    content = content_of({"a": network()})
    locator = content.rfind(b"PK\x06\x07")
    if locator < 0:
        end = content.rfind(b"PK\x05\x06")
        content, locator = content[:end] + b"PK\x06\x07" + bytes(16) + content[end:], end
    with pytest.raises(CardError, match="not a complete zip archive"):
        read_released(saved(content[: locator + 4] + b"\x09\x00\x00\x00" + content[locator + 8 :]))
