"""From nothing but a model to its card: what is here, then the Hub by hash, lineage and architecture."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import zoft
from zoft.errors import CardError
from zoft.model.fingerprint import base_hash
from zoft.model.load import Loaded
from zoft.registry import (
    BaseFile,
    Card,
    EvidenceRow,
    LocalStore,
    ModelIdentity,
    discover,
    downloaded,
    evidence_gain,
    find_tuner,
    load,
    push,
    search,
)
from zoft.registry.stores import shipped
from zoft.weights.blocks import architecture_hash, trainable_blocks

from ..hub import StandIn
from .conftest import working_card

Saved = Callable[..., Loaded]


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path: Path) -> Saved:
    """``saved(name, like=, noise=, base_model=)``: a folder of a model near or far from the one that is always made."""

    def make(name: str, noise: float = 0.0, base_model: str | None = None, **config: object) -> Loaded:
        model = tiny_model("llama", **config)
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


def grown(loaded: Loaded, noise: float, base_model: str) -> Loaded:
    """A derivative of ``loaded`` with ten more tokens, in a folder beside it."""
    folder, model = loaded.path.parent / "grown", loaded.model
    model.resize_token_embeddings(330, mean_resizing=False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\nbase_model: {base_model}\n---\n")
    return zoft.load(folder, device="cpu")


def identity_of(loaded: Loaded) -> ModelIdentity:
    return ModelIdentity.of(loaded.model, loaded.path)


def upload(hub: StandIn, name: str, folder: Path, readme: str = "") -> None:
    hub.put(name, {file.name: file.read_bytes() for file in folder.iterdir()} | {"README.md": readme.encode()})


def row(name: str, loss: float, lr: float = 1e-5, seed: int = 0) -> EvidenceRow:
    return EvidenceRow(
        name=name, task="sst2", split="dev", lr=lr, eps=1e-3, forwards=40, seed=seed, loss_start=1.0, loss=loss
    )


def test_by_the_hash_of_the_base(saved: Saved, hub: StandIn) -> None:
    base = saved("base", base_model="org/base")
    name = push(card_of(base), "org/base-tuner").name
    tuner = load("auto", base.model, folder=base.path)
    assert (tuner.source, tuner.match.kind) == (str(name), "same base")
    assert tuner.place == f"org/base-tuner@{str(name.revision)[:7]} on the Hub, published by org"
    assert not any("tag:arch" in request or "model_info" in request for request in hub.requests)


def test_what_is_here_comes_first_and_asks_nobody(saved: Saved, hub: StandIn) -> None:
    base = saved("base")
    push(card_of(base, evidence=(row("tuner", 0.1), row("mezo", 0.9))), "org/base-tuner")
    digest = LocalStore().add(card_of(base, evidence=()))
    hub.requests.clear()
    assert load("auto", base.model, folder=base.path).digest == digest
    assert hub.requests == []


def test_by_declared_lineage_over_several_levels(saved: Saved, hub: StandIn) -> None:
    """child -> middle -> base, of which only the first is here; its embedding has grown, so no hash agrees."""
    push(card_of(saved("base")), "org/base-tuner")
    hub.put("org/middle", {"README.md": b"---\nbase_model: org/lower\n---\n"})
    hub.put("org/lower", {"README.md": b"---\nbase_model:\n- org/base\n- org/gone\n---\n"})
    child = grown(saved("base"), noise=0.1, base_model="org/middle")
    tuner = load("auto", child.model, folder=child.path)
    assert tuner.match.kind == "declared"
    assert "declared derivative of org/base by the model card" in tuner.match.explanation
    assert "another vocabulary in model.embed_tokens.weight" in tuner.match.explanation


def test_a_lineage_that_runs_in_a_circle_ends(saved: Saved, hub: StandIn) -> None:
    hub.put("org/a", {"README.md": b"---\nbase_model: org/b\n---\n"})
    hub.put("org/b", {"README.md": b"---\nbase_model: org/a\n---\n"})
    child = saved("child", base_model="org/a")
    with pytest.raises(CardError, match=r"none of the 0 cards in the local store, .* on the Hub fits the model"):
        load("auto", child.model, folder=child.path)


def test_by_architecture_and_the_correlation_of_sampled_weights(saved: Saved, hub: StandIn) -> None:
    push(card_of(saved("base")), "org/base-tuner")
    child, stranger = saved("child", noise=0.1), saved("stranger", noise=100.0)
    tuner = load("auto", child.model, folder=child.path, trust=True)
    assert tuner.match.kind == "derivative" and tuner.match.correlation > 0.98
    with pytest.raises(CardError, match=r"none of the 1 cards .* the nearest, .*stranger to org/base"):
        load("auto", stranger.model, folder=stranger.path, trust=True)
    assert find_tuner(stranger.model, stranger.path, trust=True) is None


def test_nearest_first_then_by_what_the_evidence_shows(saved: Saved, hub: StandIn) -> None:
    base = saved("base")
    sure = (row("tuner", 0.2), row("mezo", 0.8))
    better = (row("tuner", 0.5), row("tuner", 0.1, lr=1e-4), row("mezo", 0.9))
    made = {
        "org/near": card_of(saved("near", noise=0.1), evidence=better),
        "org/unproven": card_of(base, evidence=()),
        "org/sure": card_of(base, evidence=sure),
        "org/better": card_of(base, evidence=better),
        "org/other": card_of(saved("other", hidden_size=64)),
    }
    for name, card in made.items():
        push(card, name)
    assert [evidence_gain(made[name]) for name in ("org/sure", "org/unproven")] == [pytest.approx(0.6), None]
    ranked = discover(identity_of(base), everything=True, trust=True)
    place = find_tuner(base.model, base.path, trust=True).place
    assert place.endswith("on the Hub, published by org, first of 3 that fit")
    assert [one.source.split("@")[0] for one in ranked] == ["org/better", "org/sure", "org/unproven", "org/near"]


def test_a_card_at_strength_zero_gains_nothing(saved: Saved) -> None:
    card = card_of(saved("base"), evidence=(row("tuner", 0.1), row("mezo", 0.9)))
    network = card.metadata.network.model_copy(update={"strength": 0.0})
    assert evidence_gain(Card(card.metadata.model_copy(update={"network": network}), card.tensors)) == 0


def test_a_gain_is_that_of_the_longest_runs(saved: Saved) -> None:
    short = (row("tuner", 0.1), row("mezo", 0.9))
    last = [one.model_copy(update={"forwards": 500, "loss": loss}) for one, loss in zip(short, (0.3, 0.2), strict=True)]
    card = card_of(saved("base"), evidence=(*short, *last))
    assert card.metadata.longest_runs == tuple(last)
    assert evidence_gain(card) == pytest.approx(-0.1)


def test_what_others_publish_under_the_tags_does_no_harm(saved: Saved, hub: StandIn) -> None:
    """No card, a torn one, one of lies, one that is private, and then the right one."""
    base = saved("base")
    right, other = card_of(base), card_of(saved("other", noise=100.0))
    lies = Card(
        other.metadata.model_copy(
            update={"base": other.metadata.base.model_copy(update={"hash": right.metadata.base.hash})}
        ),
        other.tensors,
    )
    push(right, "org/a")
    page = hub.repos.pop("org/a").head["README.md"]
    hub.put("evil/none", {"README.md": page})
    hub.put("evil/torn", {"README.md": page, "tuner.safetensors": right.content[:-5]})
    hub.put("evil/huge", {"README.md": page, "tuner.safetensors": bytes(2_000_001)})
    hub.put("evil/lies", {"README.md": page, "tuner.safetensors": lies.content})
    name = push(right, "org/a").name
    notes: list[str] = []
    assert load("auto", base.model, folder=base.path, trust=True, on_note=notes.append).source == str(name)
    assert "GET /evil/huge/resolve/main/tuner.safetensors" not in hub.requests, "its size was announced"
    assert [note.split("/")[1].split("@")[0] for note in notes] == ["none", "torn", "huge"]
    assert all(note.startswith("passed over: evil/") for note in notes)


def test_a_hub_that_cannot_be_reached_costs_a_note(saved: Saved, hub: StandIn) -> None:
    base = saved("base")
    hub.stop()
    notes: list[str] = []
    assert find_tuner(base.model, base.path, on_note=notes.append) is None
    assert len(notes) == 1 and notes[0].startswith("cards on the Hub were not looked for: tuner cards on the Hub: the ")
    digest = LocalStore().add(card_of(saved("near", noise=0.1)))
    tuner = load("auto", base.model, folder=base.path, on_note=notes.append)
    assert tuner.digest == digest and len(notes) == 1


def test_a_hub_that_is_down_or_talks_nonsense_costs_a_note(saved: Saved, hub: StandIn) -> None:
    base = saved("base")
    for kind, text in (("status", "busy or down (HTTP 503)"), ("garbage", "the Hub's answer cannot be used")):
        hub.faults.clear()
        hub.fail("GET /api/models", kind, times=100, status=503)
        notes: list[str] = []
        assert find_tuner(base.model, base.path, on_note=notes.append) is None
        assert len(notes) == 1 and text in notes[0]


def test_offline_mode_is_silent(saved: Saved, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved("base")
    push(card_of(base), "org/base-tuner")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    notes: list[str] = []
    assert find_tuner(base.model, base.path, on_note=notes.append) is None
    assert hub.requests == notes == []


def test_cards_that_come_with_zoft_are_found_offline(saved: Saved, tmp_path: Path, monkeypatch) -> None:
    base = saved("base")
    card = card_of(base)
    card.save(tmp_path / "shipped" / "base.tuner.safetensors")
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path / "shipped")
    tuner = load("auto", base.model, folder=base.path)
    assert (tuner.digest, tuner.place, tuner.source) == (card.digest, "shipped with zoft", card.digest)
    assert load(card.digest[:8], base.model, folder=base.path).digest == card.digest


def test_a_shared_store_is_looked_at(saved: Saved, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = saved("base")
    digest = LocalStore(tmp_path / "shared").add(card_of(base))
    monkeypatch.setenv("ZOFT_STORE", f"file://{tmp_path}/shared")
    tuner = load("auto", base.model, folder=base.path)
    assert (tuner.digest, tuner.place) == (digest, f"in {tmp_path}/shared")
    monkeypatch.setenv("ZOFT_STORE", "nosuch://x")
    notes: list[str] = []
    assert find_tuner(base.model, base.path, on_note=notes.append) is None
    assert len(notes) == 1 and "the store nosuch://x cannot be used" in notes[0]


def test_a_hub_model_is_recognised_by_its_published_files(saved: Saved, hub: StandIn) -> None:
    base = saved("base")
    card = card_of(base)
    weights = base.path / "model.safetensors"
    content = weights.read_bytes()
    listed = BaseFile(name=weights.name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    card = Card(
        card.metadata.model_copy(update={"base": card.metadata.base.model_copy(update={"files": (listed,)})}),
        card.tensors,
    )
    hub.lfs_patterns = ["*.safetensors"]
    upload(hub, "org/base", base.path)
    upload(hub, "org/copy", base.path, "---\nlicense: mit\n---\n")
    upload(hub, "org/child", saved("child", noise=0.1).path)
    upload(hub, "org/said", saved("said", noise=0.1).path, "---\nbase_model: org/base\n---\n")
    push(card, "org/base-tuner")
    kinds = {}
    for name in ("org/base", "org/copy", "org/child", "org/said"):
        assert not downloaded(name)
        (one,) = discover(ModelIdentity.published(name), everything=True)
        kinds[name.removeprefix("org/")] = (one.match.kind, one.match.explanation.split(":")[0])
    assert kinds["base"] == kinds["copy"] == ("same base", "same base")
    assert kinds["child"] == ("unknown", "unknown until downloaded")
    assert kinds["said"][0] == "declared"
    assert not any("model.safetensors" in request for request in hub.requests if "resolve" in request)
    zoft.load("org/copy", device="cpu")
    assert downloaded("org/copy") and not downloaded("org/base") and downloaded(str(base.path))


def test_a_model_of_the_hub_finds_cards_by_its_own_name(saved: Saved, hub: StandIn) -> None:
    """The card was made from a GGUF of it, which front matter alone says: neither a hash nor a declaration agrees."""
    card = card_of(saved("gguf", noise=0.05))
    base = card.metadata.base.model_copy(update={"id": "base.gguf"})
    push(Card(card.metadata.model_copy(update={"base": base}), card.tensors), "org/t", base_model="org/base")
    repo = hub.repos["org/t"]
    repo.head["README.md"] = repo.head["README.md"].replace(b"- zoft-arch-", b"- other-arch-")
    upload(hub, "org/base", saved("base").path)
    loaded = zoft.load("org/base", device="cpu")
    tuner = load("auto", loaded.model)
    assert tuner.source.startswith("org/t@") and tuner.match.kind == "derivative"


def test_search(saved: Saved, hub: StandIn) -> None:
    base = saved("base")
    push(card_of(base), "org/first-tuner")
    push(card_of(base), "org/second")
    hub.put("org/no-tuner", {"README.md": b""})
    assert [info.id for info in search()] == ["org/first-tuner", "org/second"]
    assert [info.id for info in search("FIRST")] == ["org/first-tuner"]
    assert [info.id for info in search("org/base")] == ["org/first-tuner", "org/second"]
    assert search("org/unheard-of") == []


def test_the_architecture_tag_is_that_of_the_card(saved: Saved, hub: StandIn) -> None:
    base = saved("base")
    push(card_of(base), "org/t")
    tag = f"zoft-arch-{architecture_hash(trainable_blocks(base.model))[:16]}"
    assert tag in hub.repos["org/t"].tags()
