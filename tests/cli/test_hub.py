"""Publishing, finding and using cards of the Hub through the command line."""

import json
from pathlib import Path

import pytest

from tests.registry.conftest import working_card
from zoft.model.fingerprint import base_hash
from zoft.model.load import load
from zoft.registry import Card, LocalStore

from ..hub import StandIn


@pytest.fixture
def card_file(model_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "a.tuner.safetensors"
    working_card(load(model_folder, device="cpu").model, base_hash(model_folder)).save(file)
    return file


def run(model: Path, rows: Path, out: Path, *more: object) -> list[object]:
    return ["finetune", model, "--data", rows, "--steps", 2, "--batch-size", 4, "--out", out, "--json", *more]


def test_push_search_pull(zoft, hub: StandIn, card_file: Path) -> None:
    pushed = json.loads(zoft("registry", "push", card_file, "org/t", "--license", "mit", "--json").stdout)
    digest = Card.load(card_file).digest
    assert pushed["digest"] == digest and pushed["url"] == f"{hub.url}/org/t/commit/{pushed['commit']}"
    (found,) = json.loads(zoft("registry", "search", "org/base", "--json").stdout)["cards"]
    assert (found["repo"], found["base"]) == ("org/t", "org/base")
    pulled = json.loads(zoft("registry", "pull", f"org/t@{pushed['commit']}", "--json").stdout)
    assert pulled == {"digest": digest, "repo": "org/t", "commit": pushed["commit"], "base": "org/base"}
    assert [entry.digest for entry in LocalStore().entries()] == [digest]
    assert digest in zoft("registry", "show", "org/t").stdout
    assert "org/t" in zoft("registry", "search").stdout


def test_private_revision_and_dry_run(zoft, hub: StandIn, card_file: Path, tmp_path: Path) -> None:
    written = zoft("registry", "push", card_file, "org/t", "--dry-run", tmp_path / "page", "--json")
    assert json.loads(written.stdout)["out"] == str(tmp_path / "page") and hub.requests == []
    assert "# Tuner for org/base" in (tmp_path / "page" / "README.md").read_text()
    zoft("registry", "push", card_file, "org/t", "--private", "--revision", "trial")
    repo = hub.repos["org/t"]
    assert repo.private and "tuner.safetensors" in repo.commits[repo.branches["trial"]]
    assert "tuner.safetensors" not in repo.head


def test_a_run_names_the_commit_and_goes_on_without_the_hub(
    zoft, hub: StandIn, card_file: Path, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    commit = json.loads(zoft("registry", "push", card_file, "org/t", "--json").stdout)["commit"]
    out = tmp_path / "run"
    hub.requests.clear()
    done = json.loads(zoft(*run(model_folder, rows, out, "--tuner", "org/t")).stdout)
    opened = [request for request in hub.requests if request.startswith("HEAD /org/t/resolve/main/tuner.safetensors")]
    assert len(opened) == 1 + 1, "the size and the download: a named card is opened once"
    assert done["tuner"]["source"] == "org/t"
    assert json.loads((out / "config.json").read_text())["tuner"] == f"org/t@{commit}"
    again = zoft("finetune", "--config", out / "config.json", "--out", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["tuner"]["digest"] == done["tuner"]["digest"]
    hub.stop()
    for name in ("org/t", f"org/t@{commit}"):
        resumed = zoft(*run(model_folder, rows, out, "--tuner", name, "--resume"))
        assert resumed.exit_code == 0, resumed.stderr


def test_neither_tuner_nor_method_asks_the_hub_and_takes_mezo_where_it_does_not_answer(
    zoft, hub: StandIn, card_file: Path, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    zoft("registry", "push", card_file, "org/t")
    untold = zoft(*run(model_folder, rows, tmp_path / "untold"))
    assert json.loads(untold.stdout)["method"] == "mezo", "the folder names no publisher"
    assert "its publisher, org, is not one that the model names" in untold.stderr and "--trust" in untold.stderr
    trusting = zoft(*run(model_folder, rows, tmp_path / "trusting", "--trust"))
    assert json.loads(trusting.stdout)["method"] == "zoft"
    assert json.loads((tmp_path / "trusting" / "config.json").read_text())["trust"] is True
    (model_folder / "README.md").write_text("---\nbase_model: org/base\n---\n")
    found = zoft(*run(model_folder, rows, tmp_path / "found"))
    assert json.loads(found.stdout)["method"] == "zoft" and "on the Hub, published by org)" in found.stderr
    assert "waiting for the Hub: tuner cards for these weights" in found.stderr
    auto = zoft(*run(model_folder, rows, tmp_path / "auto", "--tuner", "auto"))
    assert "on the Hub, published by org)" in auto.stderr
    hub.stop()
    alone = zoft(*run(model_folder, rows, tmp_path / "alone"))
    assert json.loads(alone.stdout)["method"] == "mezo", alone.stderr
    assert "cards on the Hub were not looked for" in alone.stderr and "MeZO is used" in alone.stderr


def test_metatrain_publishes(zoft, hub: StandIn, model_folder: Path, rows: Path, tmp_path: Path) -> None:
    card = tmp_path / "b.tuner.safetensors"
    arguments = ["metatrain", model_folder, "--data", rows, "--steps", 2, "--evidence", 0, "--out", card]
    refused = zoft(*arguments, "--push", "not a name")
    assert refused.exit_code == 1 and "is not a Hub id" in refused.stderr and not card.exists()
    hub.fail("POST /api/repos/create", times=100, status=403)
    failed = zoft(*arguments, "--push", "org/mine", "--json")
    assert failed.exit_code == 1 and card.is_file()
    assert f"The card is complete; try again: zoft registry push {card} org/mine" in failed.stderr
    hub.faults.clear()
    done = json.loads(zoft(*arguments, "--resume", "--push", "org/mine", "--json").stdout)
    commit = hub.repos["org/mine"].branches["main"]
    assert done["pushed"] == f"org/mine@{commit}"
    assert hub.repos["org/mine"].head["tuner.safetensors"] == card.read_bytes()


def test_match_a_model_of_the_hub_without_its_weights(zoft, hub: StandIn, card_file: Path, model_folder: Path) -> None:
    zoft("registry", "push", card_file, "org/t")
    hub.put("org/model", {file.name: file.read_bytes() for file in model_folder.iterdir()})
    (row,) = json.loads(zoft("registry", "match", "org/model", "--json").stdout)["matches"]
    assert row["kind"] == "unknown" and row["source"].startswith("org/t@")
    assert not any(
        "/resolve/" in request and "safetensors" in request for request in hub.requests if "model/" in request
    )
    (row,) = json.loads(zoft("registry", "match", "org/model", "--download", "--json").stdout)["matches"]
    assert row["kind"] == "same base" and row["correlation"] == pytest.approx(1)


def test_another_store(zoft, card_file: Path, model_folder: Path, tmp_path: Path) -> None:
    place = f"file://{tmp_path}/shared"
    digest = json.loads(zoft("registry", "add", card_file, "--store", place, "--json").stdout)["digest"]
    assert json.loads(zoft("registry", "ls", "--json").stdout)["cards"] == []
    (row,) = json.loads(zoft("registry", "ls", "--store", place, "--json").stdout)["cards"]
    assert row["digest"] == digest
    assert digest in zoft("registry", "show", digest[:8], "--store", place).stdout
    (row,) = json.loads(zoft("registry", "match", model_folder, "--store", place, "--json").stdout)["matches"]
    assert row["kind"] == "same base"
    zoft("registry", "rm", digest[:8], "--store", place)
    assert not list((tmp_path / "shared").glob("*.safetensors"))


def test_the_token_is_nowhere(
    zoft, hub: StandIn, card_file: Path, model_folder: Path, rows: Path, tmp_path: Path, zoft_home: Path, caplog
) -> None:
    """Not in what is printed, logged or written, whatever goes wrong and even if the Hub repeats it."""
    caplog.set_level("INFO")  # below it httpcore logs the headers of answers, which here repeat the token
    (token,) = hub.tokens
    said = []
    for fault in (None, {"status": 403}, {"status": 500, "times": 9}, {"status": 400}, {"status": 404}):
        if fault:
            hub.fail("* /api/*", times=fault.get("times", 1), status=fault["status"], body=f'{{"error": "{token}"}}',
                     headers={"X-Error-Message": f"bad token {token}"})  # fmt: skip
        for command in (["push", card_file, "org/t"], ["pull", "org/t"], ["search"], ["match", model_folder]):
            done = zoft("registry", *command)
            said.append(done.stdout + done.stderr)
        hub.faults.clear()
    done = zoft(*run(model_folder, rows, tmp_path / "run", "--tuner", "org/t"))
    assert done.exit_code == 0, done.stderr
    written = [file for folder in (tmp_path, zoft_home) for file in folder.rglob("*") if file.is_file()]
    assert any(file.name == "journal" for file in written)
    assert any("refuses this" in text for text in said)
    assert token not in "".join(said) + done.stdout + done.stderr + caplog.text
    assert not [file for file in written if token.encode() in file.read_bytes()]
    assert not any(
        token.encode() in content for files in hub.repos["org/t"].commits.values() for content in files.values()
    )
