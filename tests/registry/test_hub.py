"""Publishing a card and pulling it again, by the real client against a stand-in for the Hub."""

import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from zoft.errors import CardError
from zoft.registry import Card, HubName, UnreachableError, pull, push, write_folder

from ..hub import StandIn


@pytest.fixture(params=["regular", "lfs"])
def storage(request: pytest.FixtureRequest, hub: StandIn) -> str:
    """How the Hub takes the card: inside the commit, or as a large file."""
    hub.lfs_patterns = ["*.safetensors"] if request.param == "lfs" else []
    return request.param


def front_matter(page: bytes) -> dict:
    return yaml.safe_load(page.decode().split("---\n")[1])


def test_push_and_pull_are_byte_identical(card: Card, hub: StandIn, storage: str) -> None:
    pushed = push(card, "org/base-tuner", license="mit")
    repo = hub.repos["org/base-tuner"]
    assert sorted(repo.head) == [".gitattributes", "README.md", "tuner.safetensors"]
    assert repo.head["tuner.safetensors"] == card.content
    assert len(repo.commits) == 2, "one commit beside that which makes the repository"
    assert pushed.name == HubName("org/base-tuner", repo.branches["main"])
    assert bool(hub.lfs_objects) == (storage == "lfs")
    pulled, name = pull("org/base-tuner")
    assert (pulled.digest, name) == (card.digest, pushed.name)
    assert front_matter(repo.head["README.md"]) == {
        "library_name": "zoft",
        "license": "mit",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["zoft-tuner", f"zoft-base-{'ab' * 8}", f"zoft-arch-{card.metadata.base.architecture_hash[:16]}"],
    }


def test_a_second_push_keeps_what_a_person_wrote(card: Card, cards, hub: StandIn, storage: str) -> None:
    first = push(card, "org/base-tuner")
    page = hub.repos["org/base-tuner"].head["README.md"].decode()
    mine = page.replace("---\n\n<!--", "---\n\nNote of mine.\n\n<!--").replace("library_name", "mine: 1\nlibrary_name")
    mine = mine.replace("tags:\n", "tags:\n- english\n") + "\n## Limits\n\nOnly English.\n"
    hub.put("org/base-tuner", hub.repos["org/base-tuner"].head | {"README.md": mine.encode()})
    other = cards(1)
    second = push(other, "org/base-tuner")
    page = hub.repos["org/base-tuner"].head["README.md"].decode()
    assert "Note of mine.\n\n<!-- zoft: begin" in page and page.endswith(
        "<!-- zoft: end -->\n\n## Limits\n\nOnly English.\n"
    )
    data = front_matter(page.encode())
    assert data["mine"] == 1 and data["tags"][-1] == "english"
    assert other.digest in page and card.digest not in page
    assert data["tags"][1] == f"zoft-base-{other.metadata.base.hash[:16]}" and len(data["tags"]) == 4
    assert pull(first.name)[0].digest == card.digest, "the first push is still there under its commit"
    assert pull("org/base-tuner")[1] == second.name
    commits = len(hub.repos["org/base-tuner"].commits)
    assert push(other, "org/base-tuner").name == second.name
    assert len(hub.repos["org/base-tuner"].commits) == commits, "nothing changed, nothing committed"


def test_revisions(card: Card, cards, hub: StandIn) -> None:
    old = push(card, "org/t")
    trial = push(cards(1), "org/t", revision="trial")
    assert pull("org/t")[0].digest == card.digest
    assert pull("org/t@trial")[0].digest == cards(1).digest
    assert pull("org/t@trial")[1] == trial.name
    assert pull(str(old.name))[0].digest == card.digest
    with pytest.raises(CardError, match=r"org/t@v9/tuner.safetensors is not a branch, tag or commit"):
        pull("org/t@v9")
    with pytest.raises(CardError, match="is a commit, which cannot be changed"):
        push(card, "org/t", revision=str(old.name.revision))


def test_a_commit_in_the_cache_needs_no_request(card: Card, hub: StandIn) -> None:
    name = push(card, "org/t").name
    pull(name)
    hub.requests.clear()
    assert pull(name)[0].digest == card.digest
    assert hub.requests == []


def test_private_with_and_without_token(card: Card, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    push(card, "org/secret", private=True)
    assert hub.repos["org/secret"].private
    assert pull("org/secret")[0].digest == card.digest
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.environ["HF_HOME"] + "/other")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CardError, match=r"org/secret/tuner.safetensors is not on the Hub, or private: .* log in"):
        pull("org/secret")


def test_offline_the_cache_serves(card: Card, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    name = push(card, "org/t").name
    with pytest.raises(CardError):
        pull("org/other")
    pull("org/t")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("org/t")[1] == name
    assert pull("org/t")[0].digest == card.digest
    with pytest.raises(UnreachableError, match=r"org/new/tuner.safetensors: the Hub cannot be reached \(offline mode"):
        pull("org/new")


def test_unreachable_the_cache_serves(card: Card, hub: StandIn) -> None:
    name = push(card, "org/t").name
    pull("org/t")
    hub.stop()
    assert pull("org/t")[1] == name
    with pytest.raises(UnreachableError, match="the Hub cannot be reached"):
        pull("org/new")


def test_a_dry_run_writes_the_folder_and_asks_nobody(card: Card, tmp_path: Path) -> None:
    write_folder(card, "org/t", tmp_path)
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nMine.\n")
    write_folder(card, "org/t", tmp_path, license="mit")
    assert Card.load(tmp_path / "tuner.safetensors").digest == card.digest
    page = (tmp_path / "README.md").read_text()
    assert page.endswith("\nMine.\n") and "license: mit" in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "tuner.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["name", "../etc", "org/../x", "org/name/more", "org//name", "/abs/path", "org/na me", "org/name@", "a/b@../../x",
     "org/name@-x", "org/x\x1b[2J", "org/" + "n" * 200, "org/na\nme", "https://host/x", "ORG/.hidden", "o\u0155g/x"],
)  # fmt: skip
def test_hostile_names_are_refused(card: Card, hub: StandIn, name: str) -> None:
    with pytest.raises(CardError, match="is not a Hub id") as caught:
        pull(name)
    assert str(caught.value).isprintable()
    with pytest.raises(CardError):
        push(card, name)
    assert hub.requests == []
