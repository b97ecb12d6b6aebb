"""What strangers publish: never used without being named, never believed against a measurement, never waited for."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zoft
from zoft.errors import CardError, ConfigError
from zoft.model.fingerprint import base_hash
from zoft.model.load import Loaded
from zoft.registry import Card, EvidenceRow, LocalStore, ModelIdentity, discover, find_tuner, load, push, search
from zoft.registry.hub import client, deadline
from zoft.registry.match import discover as searching
from zoft.registry.stores import remote, shipped

from ..hub import StandIn
from .conftest import working_card

Saved = Callable[..., Loaded]


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path: Path) -> Saved:
    """``saved(name, noise, base_model)``: a folder of a model near or far from the one that is always made."""

    def make(name: str, noise: float = 0.0, base_model: str | None = None) -> Loaded:
        model = tiny_model("llama")
        generator = torch.Generator().manual_seed(len(name))
        for parameter in model.parameters():
            parameter.data += noise * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if base_model:
            (tmp_path / name / "README.md").write_text(f"---\nbase_model: {base_model}\n---\n")
        return zoft.load(tmp_path / name, device="cpu")

    return make


def card_of(loaded: Loaded, **changes: object) -> Card:
    return working_card(loaded.model, base_hash(loaded.path), **changes)


def claiming(card: Card, **base: object) -> Card:
    return Card(
        card.metadata.model_copy(update={"base": card.metadata.base.model_copy(update=base)}), dict(card.tensors)
    )


def evidence(gain: float) -> tuple[EvidenceRow, ...]:
    def row(name: str, loss: float) -> EvidenceRow:
        return EvidenceRow(
            name=name, task="sst2", split="dev", lr=1e-5, eps=1e-3, forwards=40, seed=0, loss_start=1.0, loss=loss
        )

    return row("tuner", 1.0 - gain), row("mezo", 1.0)


def publish(hub: StandIn, card: Card, name: str) -> None:
    """Put ``card`` where the token of the tests may not write, under the tags that `push` gives it."""
    push(card, "org/scratch")
    hub.put(name, hub.repos.pop("org/scratch").head)


def found_by_auto(loaded: Loaded, **options: object) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    tuner = find_tuner(loaded.model, loaded.path, on_note=notes.append, **options)
    return tuner and tuner.place, notes


# -- whose card ---------------------------------------------------------------------------------------------------


def test_another_publishers_card_needs_its_name_or_trust(saved: Saved, hub: StandIn) -> None:
    child = saved("child", noise=0.05, base_model="org/base")
    publish(hub, card_of(saved("base"), evidence=evidence(1e6)), "evil/t")
    place, notes = found_by_auto(child)
    assert place is None
    assert len(notes) == 1 and "its publisher, evil, is not one that the model names" in notes[0]
    assert "(--tuner evil/t)" in notes[0] and "(--trust)" in notes[0]
    with pytest.raises(CardError, match=r"may be used: the card evil/t@.* its publisher, evil, is not one"):
        load("auto", child.model, folder=child.path)
    place, _ = found_by_auto(child, trust=True)
    assert place is not None and place.endswith("on the Hub, published by evil")
    assert load("evil/t", child.model, folder=child.path).match.fits


def test_a_card_does_not_choose_its_own_base(saved: Saved, hub: StandIn) -> None:
    """The publisher that counts is one that the model names, not the one that the card says the base has."""
    base = saved("base", base_model="org/base")
    publish(hub, claiming(card_of(base), id="evil/base"), "evil/base-tuner")
    assert found_by_auto(base)[0] is None


@pytest.mark.parametrize("publisher", ["org", "ORG"])
def test_the_bases_publisher_comes_before_invented_evidence(saved: Saved, hub: StandIn, publisher: str) -> None:
    base = saved("base", base_model="Org/base")
    publish(hub, card_of(base, evidence=evidence(1e6)), "evil/t")
    publish(hub, card_of(base, evidence=evidence(0.1)), f"{publisher}/t")
    assert f"published by {publisher}" in str(found_by_auto(base)[0])
    ranked = discover(ModelIdentity.of(base.model, base.path), everything=True)
    assert [(one.publisher, one.trusted) for one in ranked] == [(publisher, True), ("evil", False)]


def test_a_local_folder_called_like_a_namespace_makes_no_publisher(
    saved: Saved, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved("base", base_model="runs/model")
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    publish(hub, card_of(base), "runs/t")
    assert found_by_auto(base)[0] is None


def test_many_repositories_of_others_do_not_hide_the_publishers(saved: Saved, hub: StandIn) -> None:
    base = saved("base", base_model="org/base")
    publish(hub, card_of(base, evidence=evidence(1e6)), "evil/t")
    for number in range(searching.REPOSITORIES + 3):
        hub.put(f"evil/t{number}", hub.repos["evil/t"].head)
    publish(hub, card_of(base), "org/t")
    assert str(found_by_auto(base)[0]).startswith("org/t@")


def test_a_card_that_merely_says_so_does_not_outrank_an_honest_one(saved: Saved, hub: StandIn) -> None:
    """By name and by hash, with and without samples: what is measured comes before what is declared."""
    base, other = saved("base"), saved("other", noise=100.0)
    child = saved("child", noise=0.05, base_model="org/base")
    says = card_of(other, evidence=evidence(10.0))
    unknown = says.metadata.base.model_copy(update={"hash": None})  # no samples at all
    nets = {name: tensor for name, tensor in says.tensors.items() if name.startswith("level")}
    silent = Card(says.metadata.model_copy(update={"base": unknown}), nets)
    honest = claiming(card_of(base), id="elsewhere")
    for number, card in enumerate((says, silent, honest)):
        publish(hub, card, f"org/t{number}")
    ranked = discover(ModelIdentity.of(child.model, child.path), everything=True, trust=True)
    assert [one.source.split("@")[0] for one in ranked] == ["org/t2", "org/t1", "org/t0"]
    assert [one.match.kind for one in ranked] == ["derivative", "declared", "stranger"]


# -- bad cards ----------------------------------------------------------------------------------------------------


def damaged(card: Card) -> bytes:
    """A card whose header gives a list as dtype."""
    return card.content.replace(b'"dtype":"F16"', b'"dtype": [ ] ', 1)


def test_one_bad_card_hides_no_other(saved: Saved, hub: StandIn, tmp_path: Path, monkeypatch) -> None:
    """In the local store, among the shipped ones and on the Hub: named, and passed over."""
    base = saved("base", base_model="org/base")
    card = card_of(base)
    publish(hub, card, "org/t")
    page = hub.repos["org/t"].head["README.md"]
    hub.put("org/a-bad-one", {"README.md": page, "tuner.safetensors": damaged(card)})
    store = LocalStore()
    store.folder.mkdir(parents=True)
    store.path("d" * 64).write_bytes(damaged(card))
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "x.tuner.safetensors").write_bytes(damaged(card))
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path / "shipped")
    place, notes = found_by_auto(base)
    assert str(place).startswith("org/t@")
    assert [note.split(":")[0] for note in notes] == ["passed over"] * 3
    assert all(name in note for name, note in zip(("dddd", "x.tuner", "org/a-bad-one"), notes, strict=True))
    with pytest.raises(CardError):
        load("org/a-bad-one", base.model, folder=base.path)
    assert store.remove("dddd") == "d" * 64


def test_a_listing_with_rows_of_another_form(saved: Saved, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("base", base_model="org/base")
    publish(hub, card_of(base), "org/t")
    real = searching.get_json

    def odd(path: str, params: object) -> object:
        rows = real(path, params)
        return (
            [None, "x", {}, {"id": []}, {"id": "a/b;rm -rf"}, {"id": "\x1b[2J/x"}, *rows] if "?" not in path else rows
        )

    monkeypatch.setattr(searching, "get_json", odd)
    assert [info.id for info in search()] == ["org/t"]
    assert str(found_by_auto(base)[0]).startswith("org/t@")


def test_recommended_values_outside_sane_bounds_are_passed_over(saved: Saved, hub: StandIn) -> None:
    base = saved("base", base_model="org/base")
    card = card_of(base)
    publish(hub, card, "org/t")
    content = card.content.replace(b'\\"lr\\":1e-05}', b'\\"lr\\":1e+05}')
    assert content != card.content
    hub.put("org/t", hub.repos["org/t"].head | {"tuner.safetensors": content})
    place, notes = found_by_auto(base)
    assert place is None and len(notes) == 1 and "recommended.lr" in notes[0]
    with pytest.raises(CardError, match=r"recommended\.lr: .* less than or equal to 0\.1, found 100000"):
        load("org/t", base.model, folder=base.path)


def test_a_store_that_can_only_be_read_is_read(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("base")
    digest = LocalStore().add(card_of(base))
    (LocalStore().folder / "index.json").unlink()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("zoft.registry.stores.local.write_text", full)
    tuner = find_tuner(base.model, base.path)
    assert tuner is not None and tuner.digest == digest


def test_a_name_that_is_no_digest_reaches_no_command(saved: Saved) -> None:
    card = card_of(saved("base"))
    store = LocalStore()
    store.add(card)
    (store.folder / "x; touch evil #.tuner.safetensors").write_bytes(card.content)
    (problem,) = [entry.problem for entry in store.entries() if entry.problem]
    assert problem.endswith("delete the file") and "registry rm" not in problem


# -- one deadline -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("drip", "GET /api/models"),
        ("drip", "GET /org/t/resolve/*"),
        ("hang", "GET /api/models"),
        ("hang", "HEAD /org/t/resolve/*"),
        ("hang", "GET /org/t/resolve/*"),
    ],
)
def test_a_slow_server_is_waited_for_once(
    saved: Saved, hub: StandIn, monkeypatch: pytest.MonkeyPatch, kind: str, request_: str
) -> None:
    base = saved("base", base_model="org/base")
    publish(hub, card_of(base), "org/t")
    hub.fail(request_, kind, times=1000)
    monkeypatch.setenv(deadline.VARIABLE, "1")
    waits: list[str] = []
    notes: list[str] = []
    begin = time.monotonic()
    tuner = find_tuner(base.model, base.path, on_note=notes.append, on_wait=waits.append)
    assert time.monotonic() - begin < 3
    assert waits[0] == "waiting for the Hub: tuner cards for these weights"
    assert tuner is None
    assert len(notes) == 1 and "no whole answer within 1 s (ZOFT_AUTO_SECONDS sets the limit)" in notes[0]


def test_what_was_found_in_time_is_used(saved: Saved, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("base", base_model="org/base")
    publish(hub, card_of(base), "org/t")
    publish(hub, card_of(base, evidence=()), "evil/slow")
    hub.fail("GET /evil/slow/*", "drip", times=1000)
    monkeypatch.setenv(deadline.VARIABLE, "2")
    place, notes = found_by_auto(base)
    assert str(place).startswith("org/t@") and "cards on the Hub were not all looked for" in notes[0]


def test_an_endless_answer_is_cut_off(saved: Saved, hub: StandIn) -> None:
    base = saved("base", base_model="org/base")
    hub.fail("GET /api/models*", "endless", times=1000)
    begin = time.monotonic()
    place, notes = found_by_auto(base)
    assert place is None and "sends more than 4,000,000 bytes" in notes[0]
    assert time.monotonic() - begin < 10 and hub.sent < 10 * client.LARGEST_ANSWER


def test_a_shared_store_that_hangs_is_waited_for_once(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("base")
    gone = threading.Event()
    monkeypatch.setenv("ZOFT_STORE", "memory://slow")
    monkeypatch.setenv(deadline.VARIABLE, "0.5")
    monkeypatch.setattr(remote.RemoteStore, "entries", lambda store: gone.wait(30))
    begin = time.monotonic()
    place, notes = found_by_auto(base)
    gone.set()
    assert place is None and time.monotonic() - begin < 3
    assert notes[0].startswith("the store that ZOFT_STORE names: no whole answer within 0.5 s")


def test_the_limit_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deadline.auto_seconds() == 15
    monkeypatch.setenv(deadline.VARIABLE, "2.5")
    assert deadline.auto_seconds() == 2.5
    for wrong in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv(deadline.VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"ZOFT_AUTO_SECONDS is {wrong}, expected seconds"):
            deadline.auto_seconds()
