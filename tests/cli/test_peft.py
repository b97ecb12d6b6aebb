"""``--lora`` and ``--prefix`` through the command line alone: train, score, replay, identify, compare, learn."""

import json

import pytest

RUN = ["--method", "mezo", "--steps", 2, "--batch-size", 4, "--eval-every", 2, "--set", "test_size=8"]


@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_from_a_base_to_a_scored_adapter(zoft, model_folder, rows, tmp_path, mode) -> None:
    run = tmp_path / "run"
    trained = zoft("finetune", model_folder, "--data", rows, f"--{mode}", *RUN, "--out", run, "--json")
    assert trained.exit_code == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert (result["lr"], result["eps"]) == ((1e-4, 1e-2) if mode == "lora" else (1e-2, 1e-1))
    scored = zoft("eval", run / "model", "--data", rows, "--set", "test_size=8", "--json")
    assert json.loads(scored.stdout)["eval_loss"] == result["test_loss"]
    assert zoft("replay", model_folder, run, "--out", tmp_path / "again").exit_code == 0
    first, base = (json.loads(zoft("fingerprint", one, "--json").stdout) for one in (run / "model", model_folder))
    assert first["base_hash"] == base["base_hash"] and first["adapter"]["kind"] == mode and "adapter" not in base
    assert mode in zoft("fingerprint", run / "model").stdout
    further = zoft("finetune", run / "model", "--data", rows, *RUN, "--out", tmp_path / "further", "--json")
    assert further.exit_code == 0, further.stderr
    assert zoft("finetune", "--out", run, "--resume", "--json").exit_code == 0


def test_settings_by_set_and_file_go_with_the_flag(zoft, model_folder, rows, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {alpha: 4}\n")
    for name, given in (
        ("a", ["--lora", "--set", "lora.rank=2", "--set", "lora.targets=k_proj,v_proj", "--config", file]),
        ("b", ["--set", "lora.rank=2", "--set", "lora.targets=v_proj,k_proj", "--config", file]),
    ):
        found = zoft("finetune", model_folder, "--data", rows, *RUN, *given, "--out", tmp_path / name)
        assert found.exit_code == 0, found.stderr
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["lora"] == {"rank": 2, "alpha": 4.0, "targets": ["k_proj", "v_proj"]}


def test_a_tuner_for_lora_and_a_run_that_it_drives(zoft, model_folder, rows, tmp_path) -> None:
    card = tmp_path / "a.tuner.safetensors"
    learned = zoft(
        "metatrain", model_folder, "--data", rows, "--lora", "--steps", 2, "--reset-every", 1, "--batch-size", 4,
        "--evidence", 0, "--out", card,
    )  # fmt: skip
    assert learned.exit_code == 0, learned.stderr
    shown = json.loads(zoft("registry", "show", card, "--json").stdout)
    assert shown["trainable"]["mode"] == "lora" and shown["training"]["config"]["eps"] == 1e-2
    settings = [*RUN[2:], "--tuner", card]
    driven = zoft("finetune", model_folder, "--data", rows, "--lora", *settings, "--out", tmp_path / "run", "--json")
    assert json.loads(driven.stdout)["method"] == "zoft"
    refused = zoft("finetune", model_folder, "--data", rows, *settings, "--out", tmp_path / "full")
    assert refused.exit_code == 1 and "covers LoRA adapters" in refused.stderr


def test_a_comparison_of_adapters_and_all_weights(zoft, model_folder, rows, tmp_path) -> None:
    file = tmp_path / "comparison.yaml"
    file.write_text(
        f"models: [{model_folder}]\ndata: {rows}\nbudget: 4\nextensions: 0\nbatch_size: 4\n"
        "settings: {train_size: 16, dev_size: 4, test_size: 4}\n"
        "methods: [{method: mezo, lr: [1.0e-3]}, {method: mezo, label: mezo-lora, settings: {lora: true}}]\n"
    )
    found = zoft("compare", file, "--out", tmp_path / "c", "--json")
    assert found.exit_code == 0, found.stderr
    rates = {cell.name.split(".lr")[1].split(".seed")[0] for cell in (tmp_path / "c" / "runs").glob("*mezo-lora*")}
    assert rates == {"5e-05", "0.0001"}  # MeZO's grid for LoRA
    flags = ["--budget", 4, "--lr", 1e-3, "--batch-size", 4, "--extensions", 0, "--set", "lora.rank=2"]
    data = ["--data", rows, "--method", "mezo", "--set", "train_size=16", "--set", "dev_size=4", "--set", "test_size=4"]
    again = zoft("compare", model_folder, *data, *flags, "--lora", "--out", tmp_path / "d")
    assert again.exit_code == 0, again.stderr
    assert json.loads((tmp_path / "d" / "settings.json").read_text())["settings"]["lora"] == {"rank": "2"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--lora", "--prefix"], "lora and prefix are both asked for"),
        (["--lora", "--set", "lora.rank=x"], "lora.rank: input should be a valid integer"),
        (["--set", "lora.rnk=2"], "lora.rnk: no such setting"),
        (["--lora", "--set", "lora.targets=query"], "no linear module called 'query'; there are down_proj"),
    ],
)
def test_mistakes_are_named(zoft, model_folder, rows, tmp_path, given, words) -> None:
    found = zoft("finetune", model_folder, "--data", rows, *RUN, *given, "--out", tmp_path / "run")
    assert found.exit_code == 1 and words in found.stderr
