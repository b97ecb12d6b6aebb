"""|theta - theta_0| over a run: logged, resumed, read by layer, drawn."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from zoft.cli.app import app
from zoft.deploy import FinetuneConfig, finetune
from zoft.deploy.displacement import displacement
from zoft.deploy.journal import read_journal
from zoft.errors import Interrupted, RunError

from .conftest import weights, with_


def test_displacement_is_logged_read_and_drawn(config: FinetuneConfig, tmp_path: Path) -> None:
    dizo = with_(config, method="dizo", options={"cycle": 4}, log_displacement=True, steps=8)
    with pytest.raises(Interrupted):
        finetune(dizo, cancelled=lambda: (dizo.out / "snapshots" / "step-00000004.safetensors").exists())
    result = finetune(dizo, resume=True)
    evaluations = read_journal(result.journal).evaluations
    assert [line.step for line in evaluations] == [0, 4, 8]
    base, kept = load_file(Path(config.model) / "model.safetensors"), weights(dizo.out)
    logged = evaluations[result.kept_step // 4].displacement
    assert logged is not None and set(logged) <= set(base)
    for name, length in logged.items():
        assert length == pytest.approx(float((kept[name].double() - base[name].double()).norm()), rel=1e-5)
    read = displacement(dizo.out, "v_proj")
    assert read.method == "dizo" and set(read.steps[0].values()) == {0.0}
    layer = logged["model.layers.2.self_attn.v_proj.weight"]
    assert read.steps[result.kept_step][2] == pytest.approx(layer)
    reported = CliRunner().invoke(
        app, ["displacement", str(dizo.out), str(dizo.out), "--out", str(tmp_path / "d.png"), "--json"]
    )
    assert reported.exit_code == 0, reported.output
    found = json.loads(reported.stdout.strip().splitlines()[-1])
    assert len(found["runs"]) == 2 and set(found["runs"][0]["steps"]) == {"0", "4", "8"}
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_logged_none_names_the_setting(config: FinetuneConfig) -> None:
    finetune(with_(config, steps=2))
    with pytest.raises(RunError, match="logged no displacement; train it with --set log_displacement=true"):
        displacement(config.out)
