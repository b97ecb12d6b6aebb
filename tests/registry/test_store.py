"""The store keeps what it was given, finds it, survives bad files and several processes at once."""

import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zoft.errors import CardError
from zoft.registry import Card, LocalStore

from .conftest import make_card

Cards = Callable[[int], Card]


def test_add_find_get_remove(cards: Cards, zoft_home: Path) -> None:
    store = LocalStore()
    assert store.entries() == []
    digests = [store.add(cards(i)) for i in range(4)]
    assert store.add(cards(0)) == digests[0]
    assert [entry.digest for entry in store.entries()] == digests[::-1], "newest first"
    assert (zoft_home / "tuners" / f"{digests[1]}.tuner.safetensors").read_bytes() == cards(1).content
    assert [entry.digest for entry in store.for_base(f"{0:064x}")] == [digests[3], digests[0]]
    assert store.get(digests[2][:12]).metadata == cards(2).metadata
    assert store.remove(digests[2][:12]) == digests[2]
    assert {entry.digest for entry in LocalStore().entries()} == {*digests} - {digests[2]}


def test_entry_says_what_the_card_says(cards: Cards) -> None:
    store = LocalStore()
    store.add(cards(1))
    (entry,) = store.entries()
    assert (entry.base_id, entry.base_hash, entry.mode, entry.blocks, entry.created, entry.problem) == (
        "org/base",
        f"{1:064x}",
        "full",
        2,
        "2026-01-02",
        None,
    )


@pytest.mark.parametrize("damage", ["absent", "torn", "stale", "other version"])
def test_index_is_rebuilt_from_the_files(cards: Cards, damage: str) -> None:
    store = LocalStore()
    digests = {store.add(cards(i)) for i in range(3)}
    index = store.folder / "index.json"
    if damage == "absent":
        index.unlink()
    elif damage == "torn":
        index.write_bytes(index.read_bytes()[:100])
    elif damage == "other version":
        index.write_text('[{"digest": "x", "shelf": 3}]')
    else:
        new = cards(5)
        new.save(store.path(new.digest))
        digests.add(new.digest)
    assert {entry.digest for entry in store.entries()} == digests
    assert len(index.read_text().splitlines()) > 10


def test_a_bad_file_hides_no_other(cards: Cards) -> None:
    store = LocalStore()
    good = store.add(cards(0))
    store.path("f" * 64).write_bytes(cards(1).content)
    store.path("e" * 64).write_bytes(b"torn")
    problems = {entry.digest[0]: entry.problem for entry in store.entries() if entry.problem}
    assert "holds a card with another digest than its name" in problems["f"]
    assert "cut short" in problems["e"]
    assert [entry.digest for entry in store.for_base(f"{0:064x}")] == [good]
    with pytest.raises(CardError, match="another digest than its name; remove it: zoft registry rm ffff"):
        store.get("ffff")
    store.remove("ffff")
    store.remove("eeee")
    assert [entry.digest for entry in store.entries()] == [good]


def test_a_bad_file_that_was_mended_is_read_again(cards: Cards) -> None:
    store = LocalStore()
    digest = cards(0).digest
    store.folder.mkdir(parents=True)
    store.path(digest).write_bytes(b"torn")
    assert store.entries()[0].problem
    store.path(digest).unlink()
    store.add(cards(0))
    assert store.entries()[0].problem is None


def test_prefixes(cards: Cards) -> None:
    store = LocalStore()
    digest = store.add(cards(0))
    with pytest.raises(CardError, match="'abc' is too short"):
        store.entry("abc")
    with pytest.raises(CardError, match=r"no card in .* begins with nope"):
        store.get("nope")
    store.path(digest[:6] + "0" * 58).write_bytes(b"")
    with pytest.raises(CardError, match="2 cards have digests that begin with"):
        store.entry(digest[:6])
    assert store.entry(digest[:6] + digest[6:16]).digest == digest


def test_a_store_that_cannot_be_written(cards: Cards, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CardError, match="cannot be written"):
        LocalStore(tmp_path / "file").add(cards(0))


def _work(folder: Path, seed: int, seconds: float, failures: "multiprocessing.Queue[str]") -> None:
    from torch import nn

    from zoft.weights.blocks import trainable_blocks

    blocks = trainable_blocks(nn.Linear(2, 2))
    made = [make_card(blocks, base_hash=f"{i:064x}") for i in range(4)]
    store, draw, end = LocalStore(folder), random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        card = draw.choice(made)
        try:
            if draw.random() < 0.5:
                store.add(card)
            else:
                store.remove(card.digest)
            store.entries()
        except CardError as error:
            if "no card in" not in str(error):  # the other process was first
                failures.put(repr(error))
        except Exception as error:
            failures.put(repr(error))


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_two_processes_at_once(tmp_path: Path, seconds: float) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    workers = [context.Process(target=_work, args=(tmp_path / "store", seed, seconds, failures)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds + 120)  # a guard against hanging: starting alone can take a minute
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert failures.empty(), failures.get()
    store = LocalStore(tmp_path / "store")
    assert all(entry.problem is None for entry in store.entries())
    assert {entry.digest for entry in store.entries()} == {
        file.name.split(".")[0] for file in store.folder.glob("[!.]*.safetensors")
    }
    for entry in store.entries():
        assert store.get(entry.digest).metadata.base.hash == entry.base_hash
    assert not list(store.folder.glob("*.tmp"))
