"""LoRA and prefixes through the whole of stage two: runs, resuming, replay, adapters trained on, tuners, mistakes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import FAMILIES
from zoft.deploy import EvalConfig, FinetuneConfig, Noted, evaluate_model, finetune, replay
from zoft.deploy.journal import read_journal
from zoft.deploy.snapshots import weights_sha256
from zoft.errors import CardError, ConfigError, ModelError, RunError
from zoft.model.adapters import LoRA, Mode, Prefix
from zoft.model.fingerprint import base_hash, fingerprint
from zoft.model.load import load
from zoft.optim import METHODS, Method, get_method
from zoft.registry import LocalStore, lineage, open_card
from zoft.weights.blocks import trainable_blocks

from .conftest import stopped_at, with_, without_times

MODES = ("lora", "prefix")


@pytest.fixture
def config(model_folder: Path, rows: Path, tmp_path: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model_folder), data=rows, method="mezo", steps=6, batch_size=8, eval_every=3, out=tmp_path / "run"
    )


@pytest.fixture
def folder_of(tiny_model, tokenizer, tmp_path: Path):
    def make(family: str) -> Path:
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = adapter(a), adapter(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_gives_an_adapter_with_the_scores_it_reports(config, folder_of, tmp_path, family, mode) -> None:
    data = tmp_path / "without-dev"  # so that the last step is kept
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text(config.data.read_text())
    changes = {"model": str(folder_of(family)), "data": data, "dtype": "bf16" if family == "opt" else "auto"}
    config = with_(config, **changes, **{mode: True})
    result = finetune(config)
    assert result.kept_step == 6 and not (config.out / "model" / "config.json").exists()
    scores = evaluate_model(EvalConfig(model=str(config.out / "model"), data=config.data))
    assert (scores.eval_loss, scores.metric) == (result.test_loss, result.test_metric)
    again = replay(config.model, config.out, tmp_path / "again")
    assert again.verified and again.step == result.kept_step
    assert torch.equal(*(torch.cat([t.flatten() for t in load_file(path).values()]) for path in (
        config.out / "model" / "adapter_model.safetensors", tmp_path / "again" / "adapter_model.safetensors"
    )))  # fmt: skip
    assert fingerprint(config.out / "model").base_hash == base_hash(Path(config.model))


@pytest.mark.parametrize("mode", MODES)
def test_the_base_is_not_moved(config, mode) -> None:
    """What peft makes of the untouched base and the written adapter is what the run evaluated."""
    config = with_(config, method="adam", **{mode: True})
    finetune(config)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), config.out / "model").eval()
    loaded = load(config.out / "model")
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    with torch.no_grad():
        assert torch.equal(
            wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits,
            loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits,
        )


@pytest.mark.parametrize(("mode", "lr"), [("lora", 3e-3), ("prefix", 3e-2)])
@pytest.mark.parametrize("method", ["adam", "mezo"])
def test_it_learns(stories260k, toys, tmp_path, mode, lr, method) -> None:
    config = FinetuneConfig(
        model=str(stories260k),
        data=toys,
        method=method,
        lr=lr if method == "adam" else 1e-3 if mode == "lora" else 3e-2,
        steps=30 if method == "adam" else 60,
        eval_every=30,
        out=tmp_path / "run",
        **{mode: True},
    )
    result = finetune(config)
    dev = evaluate_model(EvalConfig(model=str(config.out / "model"), data=toys, split="dev"))
    assert (dev.eval_loss, dev.metric) == (result.eval_loss, result.metric)
    assert result.test_loss is not None and result.eval_loss_start is not None
    if method == "adam":
        assert result.test_loss < 0.2 and result.test_metric == 1.0
    else:
        assert result.eval_loss is not None and result.eval_loss < result.eval_loss_start - 0.05


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["mezo", "dizo", "lozo", "adam"])
def test_interrupted_and_resumed_equals_unbroken(config, tmp_path, method, mode) -> None:
    options = {"targets": "q_proj,v_proj,layers", "cycle": 2, "inner": 1} if method == "dizo" else {}
    changes = {"method": method, "probes": None, "options": options, "dtype": "bf16", "accumulate": 2, mode: True}
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **changes))
    broken = with_(config, out=tmp_path / "broken", **changes)
    for stop in (1, 4):
        stopped_at(broken, stop, resume=True)
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", tmp_path / "broken")
    if method != "adam":
        assert replay(broken.model, broken.out, tmp_path / "again").verified


@pytest.mark.parametrize("mode", MODES)
def test_without_snapshots_the_journal_is_enough(config, tmp_path, mode) -> None:
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **{mode: True}))
    broken = with_(config, out=tmp_path / "broken", **{mode: True})
    stopped_at(broken, 4)
    for snapshot in (broken.out / "snapshots").iterdir():
        snapshot.unlink()
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)


@pytest.mark.parametrize("mode", MODES)
def test_accumulating_changes_nothing_but_rounding(config, tmp_path, mode) -> None:
    results = [finetune(with_(config, accumulate=parts, out=tmp_path / str(parts), **{mode: True})) for parts in (1, 4)]
    assert results[0].test_loss == pytest.approx(results[1].test_loss, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not (method.tuned or method.exact)])
def test_every_method_trains_adapters(config, method, mode) -> None:
    options = {"cycle": 1, "inner": 1} | ({"targets": "layers"} if mode == "prefix" else {})
    changes = {"options": options if method.startswith("dizo") else {}, "probes": None, "steps": 2, "eval_every": 2}
    config = with_(config, method=method, keep_model=False, **changes, **{mode: True})
    result = finetune(config)
    assert result.test_loss is not None and result.skipped_steps == 0
    published = get_method(method).settings(mode)
    assert (result.lr, result.eps) == (published.lr, published.eps) and result.lr_from == "method"
    contents = read_journal(config.out / "journal")
    start = contents.header.start
    assert contents.end.kept == 0 or contents.end.sha256 != start
    if method in ("dizo", "dizo-fo"):
        assert contents.projections


def test_masked_models_train_lora(masked_folder, config, tmp_path) -> None:
    rows = tmp_path / "data" / "sst2"
    rows.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        words = ("great", "worse", "happy", "terrible")
        lines = [{"sentence": f"the film {i} was {words[i % 4]} ", "label": 1 - i % 2} for i in range(16)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"model": str(masked_folder()), "task": "sst2", "data": rows.parent, "lora": {"rank": 2}}
    config = with_(config, **changes, lr=1e-2)
    result = finetune(config)
    scores = evaluate_model(EvalConfig(model=str(config.out / "model"), task="sst2", data=config.data))
    assert scores.eval_loss == result.test_loss
    assert replay(config.model, config.out, tmp_path / "again").verified
    with pytest.raises(ModelError, match=r"--prefix needs a causal language model"):
        finetune(with_(config, lora=None, prefix=True, out=tmp_path / "other"))


def test_generation_is_scored_with_the_adapter(config, tmp_path) -> None:
    lines = [{"prompt": f"Q: {i} A:", "completion": f" {i}"} for i in range(80)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for mode in MODES:
        run = with_(config, data=tmp_path / "own.jsonl", batch_size=4, out=tmp_path / mode, **{mode: True})
        result = finetune(run)
        scores = evaluate_model(EvalConfig(model=str(run.out / "model"), data=run.data))
        assert (scores.eval_loss, scores.metric) == (result.test_loss, result.test_metric)


# -- where it starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_journal_knows_where_the_adapter_started(config, mode) -> None:
    finetune(with_(config, seed=3, **{mode: True}))
    header = read_journal(config.out / "journal").header
    wanted = LoRA() if mode == "lora" else Prefix()
    loaded = load(config.model, adapter=wanted, seed=3)
    assert header.start == weights_sha256(trainable_blocks(loaded.model))
    other = load(config.model, adapter=wanted, seed=4)
    assert header.start != weights_sha256(trainable_blocks(other.model))


def test_a_start_that_comes_out_differently_is_refused(config, tmp_path, monkeypatch) -> None:
    changed = with_(config, prefix=True)
    stopped_at(changed, 2)

    def elsewhere(*arguments, **options):
        loaded = load(*arguments, **options)
        for value in loaded.start.values():
            value += 1e-6
        return loaded

    monkeypatch.setattr("zoft.deploy.setup.load", elsewhere)
    monkeypatch.setattr(importlib.import_module("zoft.deploy.replay"), "load", elsewhere)
    for attempt in (
        lambda: finetune(changed, resume=True),
        lambda: replay(changed.model, changed.out, tmp_path / "a", step=1),
    ):
        with pytest.raises(RunError, match=r"the adapter starts from other weights than the run did .*this machine"):
            attempt()


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_is_trained_further(config, tmp_path, mode) -> None:
    first = with_(config, out=tmp_path / "first", method="adam", **{mode: True})
    finetune(first)
    second = with_(config, model=str(first.out / "model"), out=tmp_path / "second")
    result = finetune(second)
    published = get_method("mezo").settings(mode)
    assert (result.lr, result.eps) == (published.lr, published.eps)
    one = evaluate_model(EvalConfig(model=str(first.out / "model"), data=config.data, split="dev"))
    assert result.eval_loss_start == one.eval_loss
    assert replay(second.model, second.out, tmp_path / "again").verified
    said = json.loads((second.out / "model" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == config.model
    assert lineage(second.out / "model")[0] == config.model
    with pytest.raises(RunError, match=r"the run began with an adapter, and .*model has none"):
        replay(config.model, second.out, tmp_path / "other")
    with pytest.raises(
        ModelError, match=rf"is an adapter already; it is trained with its own settings: leave out --{mode}"
    ):
        finetune(with_(second, out=tmp_path / "third", **{mode: True}))
    with pytest.raises(RunError, match=r"the run began with no adapter, and .* has one"):
        finetune(with_(config, out=tmp_path / "full"))
        replay(second.model, tmp_path / "full", tmp_path / "fourth")


@pytest.mark.parametrize("mode", MODES)
def test_the_readme_names_the_base_and_what_was_trained(config, mode) -> None:
    finetune(with_(config, **{mode: True}))
    text = (config.out / "model" / "README.md").read_text()
    assert f"base_model: {config.model}" in text and "library_name: peft" in text
    assert "base_model_relation: adapter" in text
    what = "LoRA, rank 8, alpha 16, on q_proj, v_proj" if mode == "lora" else "prefixes of 5 tokens"
    assert f"| trained | {what} |" in text


# -- defaults -------------------------------------------------------------------------------------------------------


def test_published_settings_of_mezo_and_adam() -> None:
    mezo, adam = get_method("mezo"), get_method("adam")

    def published(method: Method, mode: Mode) -> tuple[float, float]:
        settings = method.settings(mode)
        return settings.lr, settings.eps

    assert [published(mezo, mode) for mode in ("full", *MODES)] == [(1e-6, 1e-3), (1e-4, 1e-2), (1e-2, 1e-1)]
    assert [published(adam, mode) for mode in ("full", *MODES)] == [(1e-5, 1e-8), (1e-4, 1e-8), (1e-2, 1e-8)]
    assert published(get_method("zo-adamu"), "lora") == (1e-4, 1e-2)
    assert published(get_method("mezo-adam"), "lora") == (1e-4, 1e-2)  # as Adam's rate, eps as MeZO's
    assert published(get_method("fzoo"), "prefix") == (5e-2, 1e-2)


def test_settings_of_a_configuration() -> None:
    def made(**settings) -> FinetuneConfig:
        return FinetuneConfig(model="m", task="sst2", **settings)

    assert made().adapter is None and made(lora=False).adapter is None
    assert made(lora=True).adapter == made(lora="true").adapter == LoRA(rank=8, alpha=16, targets=None)
    assert made(prefix={"tokens": "7"}).adapter == Prefix(tokens=7)
    assert made(lora={"targets": "v_proj,q_proj"}).adapter == LoRA(targets=("q_proj", "v_proj"))
    again = FinetuneConfig.model_validate(json.loads(made(lora={"rank": 2}).model_dump_json()))
    assert again.adapter == LoRA(rank=2)
    for settings, words in (
        ({"lora": True, "prefix": True}, "lora and prefix are both asked for"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
        ({"lora": {"rnk": 4}}, "Extra inputs"),
        ({"prefix": {"tokens": 0}}, "greater than or equal to 1"),
        ({"lora": {"targets": []}}, "at least 1 item"),
    ):
        with pytest.raises(ValueError, match=words):
            made(**settings)


# -- tuners ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cards(config, tmp_path):
    """``cards(name, **adapter)``: a tuner learned for the model of ``config``, and kept in the store."""
    from zoft.metatrain import MetatrainConfig, metatrain

    def make(name: str, **adapter) -> Path:
        settings = {"steps": 4, "reset_every": 2, "evidence": 0, "batch_size": 4, "compare_every": 0}
        out = tmp_path / f"{name}.tuner.safetensors"
        metatrain(MetatrainConfig(model=config.model, data=config.data, out=out, **settings, **adapter))
        return out

    return make


@pytest.mark.parametrize("mode", MODES)
def test_a_tuner_is_learned_and_drives_a_run(config, cards, tmp_path, mode) -> None:
    file = cards(mode, **{mode: True})
    said = open_card(file).metadata
    assert said.trainable.mode == mode
    expected = {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]} if mode == "lora" else {"tokens": 5}
    assert said.trainable.settings == expected
    assert said.base.hash == base_hash(Path(config.model))
    assert said.base.architecture_hash == fingerprint(config.model).architecture_hash
    run = with_(config, method=None, tuner=str(file), **{mode: True})
    result = finetune(run)
    assert result.method == "zoft" and result.tuner.match.startswith("same base")
    assert any(record.scales and len(set(record.scales)) > 1 for record in read_journal(run.out / "journal").steps)
    assert replay(run.model, run.out, tmp_path / "again").verified
    if mode == "lora":  # and an adapter that was trained is driven by the same card
        further = with_(config, model=str(run.out / "model"), method=None, tuner=str(file), out=tmp_path / "further")
        assert finetune(further).method == "zoft"


def test_a_card_of_another_kind_is_refused(config, cards, tmp_path) -> None:
    full, lora = cards("full"), cards("lora", lora=True)
    refusals = (
        (full, {"lora": True}, r"covers the full model, and none of its .*zoft metatrain MODEL, with the --lora"),
        (full, {"prefix": True}, r"covers the full model"),
        (lora, {}, r"covers LoRA adapters, and none of its"),
        (lora, {"prefix": True}, r"covers LoRA adapters"),
        (lora, {"lora": {"rank": 4}}, r"was made for LoRA adapters with rank 8, not 4; train those, or make a card"),
        (lora, {"lora": {"alpha": 8}}, r"was made for LoRA adapters with alpha 16, not 8"),
        (lora, {"lora": {"targets": "k_proj"}}, r"with targets q_proj and v_proj, not k_proj"),
    )
    for number, (card, changes, words) in enumerate(refusals):
        run = with_(config, method=None, tuner=str(card), out=tmp_path / str(number), **changes)
        for force in (False, True):
            with pytest.raises(CardError, match=words):
                finetune(run, force=force)


def test_auto_passes_cards_of_another_kind_over(config, cards, tmp_path) -> None:
    full, lora = cards("full"), cards("lora", lora=True)
    assert len(LocalStore().entries()) == 2
    reported: list[str] = []

    def run(name: str, **changes):
        return finetune(
            with_(config, method=None, out=tmp_path / name, **changes),
            on_event=lambda event: reported.append(event.message) if isinstance(event, Noted) else None,
        )

    assert run("a").tuner.digest == open_card(full).digest
    assert run("b", lora=True).tuner.digest == open_card(lora).digest
    assert run("c", prefix=True).method == "mezo" and "MeZO is used" in reported[-1]
    assert run("d", lora={"rank": 2}).method == "mezo"


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_low_rank_directions_reach_thin_adapters(config) -> None:
    """Of rank 8, on blocks with 8 rows: the most nearly square matrix of a block has room for it."""
    config = with_(config, method="subzero", options={"rank": 8}, lora=True)
    finetune(config)
    mezo = with_(config, method="mezo", options={}, lr=1e-5, out=config.out.with_name("mezo"))
    finetune(mezo)
    first, second = (read_journal(one.out / "journal").steps[0].losses for one in (config, mezo))
    assert first != second


def test_without_peft_the_extra_is_named(config, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'zoft\[peft\]'"):
        finetune(with_(config, lora=True))


def test_wrong_targets_end_a_run_before_it_begins(config) -> None:
    with pytest.raises(ModelError, match=r"no linear module called 'query'; there are down_proj"):
        finetune(with_(config, lora={"targets": "query"}))
    assert not (config.out / "journal").exists()


def test_dizo_on_prefixes_names_what_there_is(config) -> None:
    with pytest.raises(ModelError, match=r"dizo projects .*; it has .*layers.*: name some by --set options.targets"):
        finetune(with_(config, method="dizo", prefix=True))
