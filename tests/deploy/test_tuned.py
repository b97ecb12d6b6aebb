"""A tuner card drives a run: MeZO where it is untrained, the same bits after a kill, found by itself, refused aloud."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zoft import tasks
from zoft.deploy import Evaluated, Event, FinetuneConfig, Noted, Warned, finetune, replay
from zoft.deploy.journal import EndLine, Journal, StepLine, read_journal
from zoft.errors import CardError, ConfigError, RunError
from zoft.model.fingerprint import base_hash
from zoft.model.load import load
from zoft.registry import Card, LocalStore
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import touched_sizes
from zoft.weights.blocks import trainable_blocks

from ..registry.conftest import disturbed, working_card
from .conftest import same, stopped_at, with_, without_times


def card_for(folder: Path, form: str = "default", **changes: Any) -> Card:
    loaded = load(folder, device="cpu")
    names = [name for name, _ in loaded.model.named_parameters()]
    net = {
        "untrained": lambda: PertNN(names, hidden=4),
        "default": lambda: disturbed(PertNN(names, hidden=4), 0.1),
        "paper": lambda: disturbed(PertNN.paper(names), 0.0),
        "touched": lambda: disturbed(PertNN(names, hidden=4, effective_size="touched_rows"), 0.1),
    }[form]()
    return working_card(loaded.model, base_hash(loaded.path), net, **changes)


@pytest.fixture
def config(config: FinetuneConfig) -> FinetuneConfig:
    return with_(config, dev_size=8, test_size=8, steps=6, eval_every=3, batch_size=8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.tuner.safetensors"


def messages(events: list[Event], kind: type) -> list[str]:
    return [event.message for event in events if isinstance(event, kind)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_untrained_tuner_gives_the_run_of_mezo(config: FinetuneConfig, file: Path, tmp_path: Path, dtype) -> None:
    card_for(Path(config.model), "untrained").save(file)
    plain = finetune(with_(config, method="mezo", dtype=dtype, out=tmp_path / "mezo"))
    tuned = finetune(with_(config, tuner=str(file), dtype=dtype, out=tmp_path / "zoft"))
    assert same(tmp_path / "mezo", tmp_path / "zoft")
    different = {key for key, value in without_times(plain).items() if without_times(tuned)[key] != value}
    assert different == {"method", "tuner", "eps_from"}  # the card recommends the eps that MeZO has
    losses = [[step.losses for step in read_journal(run.journal).steps] for run in (plain, tuned)]
    assert losses[0] == losses[1]
    assert all(set(step.scales or ()) == {1.0} for step in read_journal(tuned.journal).steps)


@pytest.mark.parametrize(("form", "dtype"), [("default", "bf16"), ("paper", "fp32")])
def test_interrupted_and_resumed_equals_unbroken(
    config: FinetuneConfig, file: Path, tmp_path: Path, form: str, dtype: str
) -> None:
    """Going on needs the run folder only: the card is gone from where it was."""
    card = card_for(Path(config.model), form)
    card.save(file)
    changes = {"tuner": str(file), "dtype": dtype, "probes": 2, "steps": 10}
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **changes))
    broken = with_(config, out=tmp_path / "broken", **changes)
    stopped_at(broken, 3)
    file.unlink()
    stopped_at(broken, 7, resume=True)
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", tmp_path / "broken")
    steps = [read_journal(tmp_path / name / "journal").steps for name in ("unbroken", "broken")]
    assert steps[0] == steps[1]
    assert all(min(step.scales) < 0.9 < 1.1 < max(step.scales) for step in steps[0] if step.scales)
    assert len({step.scales for step in steps[0]}) == 10
    assert all(("k" in step.extra) == (form == "paper") for step in steps[0])
    assert unbroken.tuner is not None and unbroken.tuner.digest == card.digest


def test_a_step_that_was_skipped_before_a_snapshot_does_not_reset_the_tuner(
    config: FinetuneConfig, file: Path, tmp_path: Path
) -> None:
    card_for(Path(config.model)).save(file)
    changes = {"tuner": str(file), "objective": "custom", "steps": 8, "batch_size": 4}

    def sometimes(model: Any, batch: Any) -> float:
        if sum(batch[0].rows[0].ids) % 3 == 0:
            return float("nan")
        ids = torch.tensor([batch[0].rows[0].ids])
        return model(ids, labels=ids).loss.item()

    finetune(with_(config, out=tmp_path / "unbroken", **changes), objective=sometimes)
    records = read_journal(tmp_path / "unbroken" / "journal").steps
    stop = next(i for i, step in enumerate(records) if step.skipped and not all(r.skipped for r in records[:i])) + 1
    assert stop < 8
    broken = with_(config, out=tmp_path / "broken", **changes)
    stopped_at(broken, stop, objective=sometimes)
    finetune(broken, resume=True, objective=sometimes)
    assert read_journal(tmp_path / "broken" / "journal").steps[stop].scales == records[stop].scales
    assert same(tmp_path / "unbroken", tmp_path / "broken")


def test_replay_needs_no_tuner(config: FinetuneConfig, file: Path, tmp_path: Path) -> None:
    card_for(Path(config.model), "paper").save(file)
    result = finetune(with_(config, tuner=str(file), dtype="bf16"))
    alone = tmp_path / "journal-alone"
    alone.write_bytes(result.journal.read_bytes())
    file.unlink()
    replayed = replay(config.model, alone, tmp_path / "again")
    assert replayed.verified and replayed.step == result.kept_step


def test_the_run_reports_its_tuner(config: FinetuneConfig, file: Path) -> None:
    card = card_for(Path(config.model))
    card.save(file)
    events: list[Event] = []
    result = finetune(with_(config, tuner=str(file), lr=None), on_event=events.append)
    assert (result.method, result.lr, result.lr_from) == ("zoft", 1e-5, "card")
    assert result.public()["tuner"] == {
        "digest": card.digest,
        "source": str(file),
        "base": "org/base",
        "match": f"same base: the card was made for these weights (org/base, {base_hash(Path(config.model))[:16]})",
    }
    assert messages(events, Noted) == [f"tuner {card.digest[:16]}: {result.tuner.match}"]
    header = read_journal(result.journal).header
    assert header is not None and header.tuner == result.tuner
    assert Card.load(config.out / "tuner.safetensors").digest == card.digest
    assert card.digest in (config.out / "model" / "README.md").read_text()
    written = json.loads((config.out / "config.json").read_text())
    assert (written["method"], written["tuner"]) == ("zoft", str(file))


@pytest.mark.parametrize(
    ("lr", "recommended", "expected"),
    [
        (3e-5, {"lr": 2e-5, "eps": 2e-3}, (3e-5, "flag", 2e-3, "card")),
        (None, {"lr": 2e-5}, (2e-5, "card", 1e-3, "method")),
        (None, {}, (1e-6, "method", 1e-3, "method")),
    ],
)
def test_flag_then_card_then_method(config: FinetuneConfig, lr, recommended: dict, expected: tuple) -> None:
    card = card_for(Path(config.model))
    said = card.metadata.recommended.model_copy(update={"lr": None, "eps": None} | recommended)
    LocalStore().add(Card(card.metadata.model_copy(update={"recommended": said}), card.tensors))
    result = finetune(with_(config, tuner="auto", lr=lr, steps=1))
    assert (result.lr, result.lr_from, result.eps, result.eps_from) == expected
    (record,) = read_journal(result.journal).steps
    assert (record.lr[0], record.eps) == (result.lr, result.eps)


def test_a_run_longer_than_those_of_the_evidence_takes_a_lower_rate(config: FinetuneConfig) -> None:
    card = card_for(Path(config.model))
    (row,) = card.metadata.evidence
    found_in_one = row.model_copy(update={"lr": 2e-5, "forwards": 2})
    for evidence, expected in [((found_in_one,), 1e-5), ((found_in_one.model_copy(update={"forwards": 8}),), 2e-5)]:
        recommended = card.metadata.recommended.model_copy(update={"lr": 2e-5})
        said = card.metadata.model_copy(update={"evidence": (row, *evidence), "recommended": recommended})
        digest = LocalStore().add(Card(said, card.tensors))
        result = finetune(with_(config, tuner=digest, lr=None, steps=4), force=True)
        assert (result.lr, result.lr_from) == (pytest.approx(expected), "card")
        assert read_journal(result.journal).steps[0].lr[0] == result.lr


def test_neither_tuner_nor_method_takes_the_card_that_fits_else_mezo(config: FinetuneConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    result = finetune(with_(config, steps=1, out=tmp_path / "none"), on_event=events.append)
    assert (result.method, result.tuner) == ("mezo", None)
    assert any("neither --tuner nor --method" in note and "MeZO is used" in note for note in messages(events, Noted))
    digest = LocalStore().add(card_for(Path(config.model)))
    found = finetune(with_(config, steps=3, out=tmp_path / "found"))
    assert found.method == "zoft" and (found.tuner.digest, found.tuner.source) == (digest, "auto")
    again = FinetuneConfig.model_validate_json((tmp_path / "found" / "config.json").read_text())
    assert (again.method, again.tuner) == ("zoft", digest)
    assert finetune(with_(config, method="mezo", steps=1, out=tmp_path / "mezo")).method == "mezo"
    stopped_at(with_(config, out=tmp_path / "auto", tuner="auto"), 2)
    LocalStore().remove(digest)
    assert finetune(with_(config, out=tmp_path / "auto", tuner="auto"), resume=True).tuner.source == "auto"
    with pytest.raises(CardError, match=r"none of the 0 cards .*zoft metatrain"):
        finetune(with_(config, method="zoft", out=tmp_path / "absent"))


def test_a_card_of_the_base_drives_a_fine_tune_of_it_and_no_stranger(
    config: FinetuneConfig, stories260k: Path, tmp_path: Path
) -> None:
    """The fine-tune is a first-order one, saved without a model card: its weights alone tell where it comes from."""
    LocalStore().add(card_for(stories260k))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories260k), AutoTokenizer.from_pretrained(stories260k)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for line in ("Lily got a red ball. Lily was happy.", "Tom lost a kite. Tom was sad.", "Sue had a dog.") * 5:
        ids = tokenizer(line, return_tensors="pt").input_ids
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        stranger = AutoModelForCausalLM.from_config(model.config)
    for name, saved in (("derivative", model), ("stranger", stranger)):
        saved.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    result = finetune(with_(config, model=str(tmp_path / "derivative"), steps=2))
    assert result.method == "zoft" and result.tuner.match.startswith(
        "derivative of org/base: sampled weights correlate"
    )
    other = with_(config, model=str(tmp_path / "stranger"), steps=2, out=tmp_path / "other")
    with pytest.raises(CardError, match=r"none of the 1 cards.*stranger to org/base"):
        finetune(with_(other, tuner="auto"))
    file = tmp_path / "a.tuner.safetensors"
    card_for(stories260k).save(file)
    with pytest.raises(CardError, match=r"stranger to org/base: .*--force uses it anyway"):
        finetune(with_(other, tuner=str(file)))
    assert not other.out.exists()
    events: list[Event] = []
    stopped_at(with_(other, tuner=str(file)), 1, force=True)
    forced = finetune(with_(other, tuner=str(file)), resume=True)  # needs no force again
    assert forced.steps == 2 and forced.tuner.match.startswith("stranger")
    finetune(with_(other, tuner=str(file)), force=True, on_event=events.append)
    assert any(warning.startswith("accepted by --force: tuner") for warning in messages(events, Warned))


def test_another_card_on_resuming_is_refused(config: FinetuneConfig, file: Path, tmp_path: Path) -> None:
    card = card_for(Path(config.model))
    card.save(file)
    run = with_(config, tuner=str(file))
    stopped_at(run, 2)
    card_for(Path(config.model), "paper").save(tmp_path / "other.tuner.safetensors")
    with pytest.raises(RunError, match=rf"holds a run with the card {card.digest[:16]}, .*other.*resume without --tun"):
        finetune(with_(run, tuner=str(tmp_path / "other.tuner.safetensors")), resume=True)
    with pytest.raises(RunError, match="holds a run of method zoft"):
        finetune(with_(run, tuner=None, method="mezo"), resume=True)
    kept = config.out / "tuner.safetensors"
    card_for(Path(config.model), "paper").save(kept)
    with pytest.raises(RunError, match=rf"is the card .*, the run began with {card.digest[:16]}"):
        finetune(run, resume=True)
    kept.unlink()
    with pytest.raises(RunError, match=rf"is missing.*put the card {card.digest[:16]} there"):
        finetune(run, resume=True)
    card.save(kept)
    assert finetune(with_(run, tuner=None), resume=True).tuner.digest == card.digest
    mezo = with_(config, method="mezo", out=tmp_path / "mezo")
    stopped_at(mezo, 1)
    with pytest.raises(RunError, match="holds a run of method mezo"):
        finetune(with_(mezo, method=None, tuner=str(file)), resume=True)


def flip(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


def with_nan(content: bytes) -> bytes:
    return content[:-4] + b"\x00\x00\xc0\x7f"  # base.statistics comes last


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: flip(content, b'\\"format\\":1', b'\\"format\\":2'), r"format 2, this zoft reads format 1"),
        (lambda content: content[: len(content) // 2], "damaged|cut short"),
        (lambda content: content[:5], "not a safetensors file, or cut short"),
        (with_nan, "holds NaN or infinite numbers"),
        (lambda content: content + bytes(2_000_000), "2 MB or more"),
        (lambda content: b"junk" * 100, "not a safetensors file"),
    ],
)
def test_a_bad_card_is_one_sentence_before_anything_is_loaded(
    config: FinetuneConfig, file: Path, damage: Any, message: str
) -> None:
    file.write_bytes(damage(card_for(Path(config.model)).content))
    events: list[Event] = []
    with pytest.raises(CardError, match=message) as error:
        finetune(with_(config, tuner=str(file)), on_event=events.append)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not events and not config.out.exists()


def test_a_card_of_other_blocks_is_refused(config: FinetuneConfig, file: Path, tiny_model, tokenizer, tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    adapters = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 2)})
    for card, message in (
        (card_for(tmp_path / "tiny"), r"another architecture, org/base: 20 blocks have another shape"),
        (working_card(adapters, "ab" * 32, trainable="lora"), "covers LoRA adapters"),
    ):
        card.save(file)
        for force in (False, True):
            with pytest.raises(CardError, match=message):
                finetune(with_(config, tuner=str(file)), force=force)
            assert not config.out.exists()


def test_a_tuner_goes_with_method_zoft_only(config: FinetuneConfig) -> None:
    with pytest.raises(ValueError, match="method mezo takes no tuner"):
        with_(config, tuner="auto", method="mezo")
    with pytest.raises(CardError, match=r"absent\.safetensors is neither a local file, nor"):
        finetune(with_(config, tuner="absent.safetensors"))
    with pytest.raises(ConfigError, match="no method 'zofft'; did you mean 'zoft'"):
        finetune(with_(config, method="zofft"))


def test_touched_rows_are_those_of_the_batch(
    config: FinetuneConfig, file: Path, tiny_model, tokenizer, tmp_path
) -> None:
    """With an untied embedding ``sum m s^2 = sum m``, where the embedding counts the batch's distinct tokens."""
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    card_for(tmp_path / "tiny", "touched").save(file)
    run = with_(config, model=str(tmp_path / "tiny"), tuner=str(file), steps=3)
    records = read_journal(finetune(run).journal).steps
    loaded = load(tmp_path / "tiny", device="cpu")
    rows = tasks.prepare(None, config.data, loaded.tokenizer, context_length=256).train
    blocks = trainable_blocks(loaded.model)
    for record in records:
        batch = [rows[i] for i in tasks.batch_indices(len(rows), run.batch_size, run.seed, record.step)]
        tokens = {token for one in batch for row in one.rows for token in row.ids}
        sizes = touched_sizes(blocks, None, ())
        whole = sizes.clone()
        sizes[0] = 32 * len(tokens)
        squares = torch.tensor(record.scales, dtype=torch.float64).square()
        assert float((sizes * squares).sum()) == pytest.approx(float(sizes.sum()), rel=1e-6)
        assert float((whole * squares).sum()) != pytest.approx(float(whole.sum()), rel=1e-3)


def rewritten(path: Path, **absent: None) -> None:
    """Write the journal at ``path`` again as an early version did, without some fields of its header."""
    contents = read_journal(path)
    path.unlink()
    journal = Journal(path)
    assert contents.header is not None
    journal.append(contents.header.model_copy(update=absent))
    for record in contents.steps:
        journal.append(StepLine.of(record))
    if contents.end is not None:
        journal.append(contents.end)
    journal.close()


def test_journals_of_early_versions_are_read(config: FinetuneConfig, tmp_path: Path) -> None:
    run = with_(config, method="mezo")
    finetune(with_(run, out=tmp_path / "unbroken"))
    stopped_at(run, 4)
    rewritten(config.out / "journal", data_hash=None, tuner=None)
    assert b"data_hash" not in (config.out / "journal").read_bytes()
    events: list[Event] = []
    finetune(run, resume=True, on_event=events.append)
    assert same(tmp_path / "unbroken", config.out)
    assert any("does not record the data" in warning for warning in messages(events, Warned))


def test_a_result_of_another_version_is_one_sentence(config: FinetuneConfig) -> None:
    run = with_(config, method="mezo", steps=1)
    result = finetune(run)
    contents = read_journal(result.journal)
    assert contents.end is not None
    older = {("lr_source" if key == "lr_from" else key): value for key, value in contents.end.result.items()}
    contents.end = EndLine(kept=contents.end.kept, sha256=contents.end.sha256, result=older)
    whole = result.journal.read_bytes()
    before_end = whole[: whole.rindex(b"\n", 0, -1) + 1]
    result.journal.write_bytes(before_end)
    journal = Journal(result.journal, read_journal(result.journal))
    journal.append(contents.end)
    journal.close()
    with pytest.raises(RunError, match=r"written by another version of zoft \(lr_from: .*zoft eval"):
        finetune(run, resume=True)


def test_every_dev_score_is_reported_once(config: FinetuneConfig) -> None:
    events: list[Event] = []
    finetune(with_(config, method="mezo"), on_event=events.append)
    reported = [(event.split, event.step) for event in events if isinstance(event, Evaluated)]
    assert reported[:-1] == [("dev", 0), ("dev", 3), ("dev", 6)]
    assert reported[-1][0] == "test"


def test_a_finished_run_with_a_tuner_returns_its_result(config: FinetuneConfig, file: Path) -> None:
    card_for(Path(config.model)).save(file)
    run = with_(config, tuner=str(file), steps=2)
    result = finetune(run)
    assert finetune(run, resume=True) == result


def test_a_tuner_and_a_projection_together(config: FinetuneConfig, file: Path, tmp_path: Path) -> None:
    card_for(Path(config.model)).save(file)
    changes = {"tuner": str(file), "method": "zoft+dizo", "options": {"cycle": 2, "inner": 1}}
    unbroken = finetune(with_(config, out=tmp_path / "unbroken", **changes))
    broken = with_(config, out=tmp_path / "broken", **changes)
    stopped_at(broken, 3)
    assert without_times(finetune(broken, resume=True)) == without_times(unbroken)
    assert same(tmp_path / "unbroken", tmp_path / "broken")
    assert (unbroken.method, unbroken.forwards) == ("zoft+dizo", 6 * 2 + 3 * 2)
    assert replay(config.model, tmp_path / "broken", tmp_path / "replayed").verified
