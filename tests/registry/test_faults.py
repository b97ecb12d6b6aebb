"""Faults of the Hub and of the way to it: each is survived, or ends in one clear error and no bad card."""

import dataclasses
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from zoft.errors import CardError
from zoft.registry import Card, HubName, UnreachableError, push
from zoft.registry.hub import client
from zoft.registry.hub import pull as cards_on_hub
from zoft.registry.hub.pull import pull

from ..hub import StandIn

HEAD, GET = "HEAD /org/t/resolve/*", "GET /org/t/resolve/*"


@pytest.fixture(params=["regular", "lfs"])
def hub(request: pytest.FixtureRequest, hub: StandIn, card: Card, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in with a card as ``org/t``, small or as a large file on another host, and short patience."""
    hub.lfs_patterns = ["*.safetensors"] if request.param == "lfs" else []
    push(card, "org/t")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr(cards_on_hub, "TIMEOUT", 0.5)
    monkeypatch.setattr(client, "LONGEST_WAIT", 2.0)
    return hub


@pytest.fixture
def body(hub: StandIn) -> str:
    """Requests for the content of the card."""
    return "GET /cdn/*" if hub.lfs_patterns else GET


def cached_files() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob("*tuner.safetensors"))


def test_500s_then_success(hub: StandIn, card: Card) -> None:
    hub.fail(HEAD, times=2, status=500)
    assert pull("org/t")[0].digest == card.digest


def test_500s_while_the_content_is_sent(hub: StandIn, card: Card, body: str) -> None:
    hub.fail(body, times=2, status=502)
    assert pull("org/t")[0].digest == card.digest


def test_500s_for_ever(hub: StandIn) -> None:
    hub.fail(HEAD, times=100, status=503)
    with pytest.raises(UnreachableError, match=r"org/t/tuner.safetensors: the Hub is busy or down \(HTTP 503\)"):
        pull("org/t")


def test_busy_with_retry_after(hub: StandIn, card: Card) -> None:
    hub.fail(HEAD, times=1, status=429, headers={"Retry-After": "1"})
    assert pull("org/t")[0].digest == card.digest


def test_busy_for_longer_than_anybody_waits(hub: StandIn) -> None:
    hub.fail(HEAD, times=1, status=429, headers={"Retry-After": "86400"})
    with pytest.raises(UnreachableError, match=r"busy or down \(HTTP 429, and asks to wait 86400 s\)"):
        pull("org/t")


def test_push_while_the_hub_is_busy(hub: StandIn, cards) -> None:
    for request in ("POST /api/repos/create", "GET /api/models/org/t", "POST */preupload/*", "POST */commit/*"):
        hub.fail(request, times=1, status=503)
    other = cards(1)
    push(other, "org/t")
    assert pull("org/t")[0].digest == other.digest


def test_a_connection_cut_mid_file_is_resumed(hub: StandIn, card: Card, body: str) -> None:
    hub.fail(body, "cut")
    assert pull("org/t")[0].digest == card.digest


def test_wrong_bytes_of_the_right_length(hub: StandIn, card: Card, body: str) -> None:
    """Refused by their digest, and not kept: the next try gets the right ones."""
    hub.fail(body, "wrong bytes")
    with pytest.raises(CardError, match=r"is not what the Hub published .* it was removed from the cache: try again"):
        pull("org/t")
    assert cached_files() == []
    assert pull("org/t")[0].digest == card.digest


def test_wrong_bytes_in_the_cache(hub: StandIn, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("org/t")
    (file,) = cached_files()
    blob = file.resolve()
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CardError, match="is not what the Hub published"):
        pull("org/t")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert pull("org/t")[0].digest == card.digest


def test_no_etag(hub: StandIn) -> None:
    hub.fail(HEAD, "no etag", times=9)
    with pytest.raises(CardError, match="names no ETag, so it cannot be checked"):
        pull("org/t")


def test_time_out_of_the_first_answer(hub: StandIn) -> None:
    hub.fail(HEAD, "hang")
    with pytest.raises(UnreachableError, match="the Hub cannot be reached"):
        pull("org/t")


def test_time_out_of_the_content_is_tried_again(hub: StandIn, card: Card, body: str) -> None:
    hub.fail(body, "hang")
    assert pull("org/t")[0].digest == card.digest


def test_too_large_a_file_is_not_downloaded(hub: StandIn) -> None:
    hub.put("org/t", {"tuner.safetensors": bytes(2_000_000)})
    hub.requests.clear()
    with pytest.raises(CardError, match="is of 2,000,000 bytes, expected at most 1,999,999 bytes; it was not"):
        pull("org/t")
    assert not [request for request in hub.requests if request.startswith("GET")]


def test_more_bytes_than_announced(hub: StandIn, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length that changes between announcement and content: the download ends at the limit."""
    announced = huggingface_hub.get_hf_file_metadata
    monkeypatch.setattr(
        huggingface_hub, "get_hf_file_metadata", lambda *a, **k: dataclasses.replace(announced(*a, **k), size=1000)
    )
    hub.put("org/t", {"tuner.safetensors": bytes(30_000_000)})
    with pytest.raises(CardError, match="sends more than 1,999,999 bytes; not downloaded"):
        pull("org/t")
    assert cached_files() == []


def test_a_repository_that_vanished(hub: StandIn, card: Card) -> None:
    """A cached commit can still be read; reading the branch is an error."""
    _, name = pull("org/t")
    del hub.repos["org/t"]
    with pytest.raises(CardError, match="is not on the Hub, or private"):
        pull("org/t")
    assert pull(name)[0].digest == card.digest


def test_a_repository_without_a_card(hub: StandIn) -> None:
    hub.put("org/none", {"README.md": b""})
    with pytest.raises(CardError, match=r"org/none/tuner.safetensors is not on the Hub: the repository exists"):
        pull("org/none")


def test_a_login_page_instead_of_an_answer(hub: StandIn) -> None:
    hub.fail("*", "garbage", times=100)
    with pytest.raises(CardError, match=r"names no commit|cannot be used|names no ETag"):
        pull("org/t")
    with pytest.raises(CardError, match="the Hub's answer cannot be used"):
        push(Card.load(Path(__file__).parent / "data" / "format-1.tuner.safetensors"), "org/t")


def test_no_right_to_write(hub: StandIn, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CardError, match=r"other/t: the Hub refuses this \(HTTP 403\); log in with a token that permits"
    ):
        push(card, "other/t")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CardError, match=r"org/new: the Hub refuses this \(HTTP 401\); log in"):
        push(card, "org/new")


def test_two_pushes_at_once_do_not_overwrite_each_other(hub: StandIn, cards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's commit comes between the README that was merged and the commit that replaces it."""
    create = huggingface_hub.HfApi.create_commit

    def late(self, *arguments, **options):
        hub.put("org/t", hub.repos["org/t"].head | {"README.md": b"from somebody else"})
        return create(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    with pytest.raises(CardError, match="someone else has changed the repository since"):
        push(cards(1), "org/t")
    assert hub.repos["org/t"].head["README.md"] == b"from somebody else"


def test_a_commit_that_is_none(hub: StandIn, card: Card) -> None:
    """A name that would leave the cache's folder is refused where it comes from."""
    hub.repos["org/t"].branches["main"] = "../../../evil"
    hub.repos["org/t"].commits["../../../evil"] = {"tuner.safetensors": card.content}
    with pytest.raises(CardError, match="names no commit"):
        pull("org/t")
    assert not list(Path(os.environ["HF_HOME"]).rglob("evil*"))


def test_every_error_is_one_line_of_text(hub: StandIn) -> None:
    hub.fail(HEAD, status=418, body="\x1b[2J\x07evil\n" * 50, headers={"X-Error-Message": "\x1b[31mred"})
    with pytest.raises(CardError) as caught:
        pull("org/t")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_name_pins_what_is_a_commit() -> None:
    assert HubName.parse(f"org/t@{'0' * 40}").pinned and not HubName.parse("org/t@main").pinned
