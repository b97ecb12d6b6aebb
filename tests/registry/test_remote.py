"""A store on any file system that fsspec knows."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from zoft.errors import CardError
from zoft.registry import MAX_BYTES, Card, LocalStore, RemoteStore, open_store

Cards = Callable[[int], Card]


@pytest.fixture
def store() -> RemoteStore:
    files = fsspec.filesystem("memory")
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)
    return RemoteStore("memory://bucket/tuners")


def test_add_find_get_remove(cards: Cards, store: RemoteStore) -> None:
    assert store.entries() == []
    digests = [store.add(cards(i)) for i in range(4)]
    assert store.add(cards(0)) == digests[0]
    assert [entry.digest for entry in store.entries()] == digests[::-1], "newest first"
    assert [entry.digest for entry in store.for_base(f"{0:064x}")] == [digests[3], digests[0]]
    assert store.get(digests[2][:12]).metadata == cards(2).metadata
    assert fsspec.filesystem("memory").cat(f"/bucket/tuners/{digests[1]}.tuner.safetensors") == cards(1).content
    assert store.remove(digests[2][:12]) == digests[2]
    again = RemoteStore("memory://bucket/tuners/")
    assert {digest for digest, _ in again.cards()} == {*digests} - {digests[2]}
    with pytest.raises(
        CardError, match=f"no card in memory://bucket/tuners has a digest that begins with {digests[2]}"
    ):
        again.get(digests[2])


def test_a_card_that_was_read_once_is_kept(cards: Cards, store: RemoteStore, zoft_home: Path, monkeypatch) -> None:
    digest = store.add(cards(0))
    store.get(digest)
    (copy,) = (zoft_home / "remote").iterdir()
    assert copy.read_bytes() == cards(0).content
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", lambda *a, **k: pytest.fail("read again"))
    assert store.get(digest).digest == digest


def test_a_damaged_copy_is_fetched_again(cards: Cards, store: RemoteStore, zoft_home: Path) -> None:
    digest = store.add(cards(0))
    store.get(digest)
    (copy,) = (zoft_home / "remote").iterdir()
    copy.write_bytes(cards(1).content)
    assert store.get(digest).digest == digest
    assert copy.read_bytes() == cards(0).content


def test_bad_files_are_named_and_hide_no_other(cards: Cards, store: RemoteStore) -> None:
    good = store.add(cards(0))
    files = fsspec.filesystem("memory")
    files.pipe(f"/bucket/tuners/{'e' * 64}.tuner.safetensors", b"torn")
    files.pipe(f"/bucket/tuners/{'f' * 64}.tuner.safetensors", cards(1).content)
    files.pipe(f"/bucket/tuners/{'d' * 64}.tuner.safetensors", bytes(MAX_BYTES + 5))
    files.pipe("/bucket/tuners/..%2f.tuner.safetensors", b"x")
    files.pipe("/bucket/tuners/readme.txt", b"x")
    problems = {entry.digest[0]: entry.problem for entry in store.entries() if entry.problem}
    assert sorted(problems) == ["d", "e", "f"]
    assert "a card with another digest than its name" in problems["f"] and "2 MB or more" in problems["d"]
    assert [digest for digest, _ in store.cards()] == [good]


def test_addresses(tmp_path: Path, zoft_home: Path) -> None:
    assert open_store().place == str(zoft_home / "tuners")
    for place in (tmp_path / "s", str(tmp_path / "s"), f"file://{tmp_path}/s"):
        store = open_store(place)
        assert isinstance(store, LocalStore) and store.folder == tmp_path / "s"
    with pytest.raises(CardError, match=r"the store nosuch://x cannot be used \(Protocol not known: nosuch"):
        open_store("nosuch://x")


def test_passwords_in_addresses_are_not_shown() -> None:
    with pytest.raises(CardError) as caught:
        open_store("nosuch://me:sesame@host/x")
    assert "sesame" not in str(caught.value) and "***@host" in str(caught.value)
