import json
import shutil
from pathlib import Path

import pytest

from zoft.deploy import FinetuneConfig, finetune, replay
from zoft.deploy.journal import read_journal
from zoft.registry import Card

from .make import digest, weights_in

RELEASES = sorted(path for path in Path(__file__).parent.iterdir() if (path / "expected.json").is_file())
RUNS = [
    pytest.param(release, name, id=f"{release.name}-{name}")
    for release in RELEASES
    for name in json.loads((release / "expected.json").read_text())
]


def expected(release: Path, name: str) -> str:
    return json.loads((release / "expected.json").read_text())[name]


def test_there_is_a_golden_release() -> None:
    assert RELEASES


@pytest.mark.parametrize(("release", "name"), RUNS)
def test_a_run_of_an_earlier_release_replays_to_the_same_bits(release: Path, name: str, tmp_path: Path) -> None:
    replay(str(release / "base"), release / name, tmp_path / "out")
    assert digest(weights_in(tmp_path / "out")) == expected(release, name)


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_stopped_run_of_an_earlier_release_goes_on(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses depend on the CPU, so the steps that are taken here are checked by replaying them."""
    shutil.copytree(release, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    run = Path("stopped")
    before = (run / "journal").read_bytes()
    contents = read_journal(run / "journal")
    assert contents.header is not None
    finetune(FinetuneConfig.model_validate(contents.header.config), resume=True)
    assert (run / "journal").read_bytes().startswith(before)
    assert len(read_journal(run / "journal").steps) == contents.header.config["steps"]
    shutil.rmtree(run / "snapshots")  # a replay starts from the base, a resumed run from the release's own snapshot
    replay("base", run, Path("replayed"))
    assert digest(weights_in(Path("replayed"))) == digest(weights_in(run / "model"))


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_card_of_an_earlier_release_gives_the_same_scales(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(release, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    old = read_journal(Path("zoft", "journal"))
    assert old.header is not None
    assert Card.load(Path("tuner.safetensors")).digest == Card.load(Path("zoft", "tuner.safetensors")).digest
    finetune(FinetuneConfig.model_validate({**old.header.config, "out": "again"}))
    first = [contents.steps[0].scales for contents in (old, read_journal(Path("again", "journal")))]
    assert first[0] is not None and max(first[0]) > 1.01 * min(first[0])
    assert first[1] == pytest.approx(first[0], rel=1e-4)
