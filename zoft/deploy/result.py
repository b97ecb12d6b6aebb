"""Results of stage two; their fields are the keys that ``--json`` prints."""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from zoft.deploy.choice import Choice, Origin
from zoft.deploy.config import FinetuneConfig
from zoft.deploy.journal import Contents, EndLine, TunerUsed
from zoft.deploy.setup import batch_of
from zoft.errors import RunError
from zoft.tasks import Evaluation, Prepared


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=(), ser_json_inf_nan="strings")

    def public(self) -> dict[str, Any]:
        """The result as JSON values."""
        return self.model_dump(mode="json")


class FinetuneResult(_Result):
    """Outcome of a run. ``eval_loss``, ``metric`` and the test scores are of the weights as written to ``out/model``.

    ``train_loss`` is the mean measured loss of the last tenth of the steps; ``forwards``, ``examples`` and ``tokens``
    count what training evaluated (a pass over all n training examples is n / B forwards, with tokens estimated from the
    step's batch); ``lr_from`` and ``eps_from`` are the origin of the value: given, recommended by the card, or the
    method's published default.
    """

    method: str
    model: str
    task: str
    steps: int
    kept_step: int
    forwards: int | float
    examples: int
    tokens: int
    lr: float
    lr_from: Origin
    eps: float
    eps_from: Origin
    batch_size: int
    seed: int
    objective: str
    train_loss: float
    eval_loss_start: float | None
    eval_loss: float | None
    metric_start: float | None
    metric: float | None
    metric_name: str
    test_loss: float | None
    test_metric: float | None
    skipped_steps: int
    zero_slope_steps: int
    seconds: float
    peak_memory_bytes: int
    out: Path
    tuner: TunerUsed | None
    journal: Path
    exact: str = "none"
    body: str = "zo"
    exact_lr: float | None = None


def finished(end: EndLine, journal: Path) -> FinetuneResult:
    """Return the result that ``journal`` ends with; `RunError` if another version of zoft wrote other keys."""
    try:
        return FinetuneResult.model_validate(end.result)
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(
            f"{journal}: the run is finished, its result was written by another version of zoft "
            f"({first['loc'][0]}: {first['msg']}); score its weights again: zoft eval {journal.parent / 'model'}"
        ) from error


def summarise(
    config: FinetuneConfig,
    contents: Contents,
    choice: Choice,
    prepared: Prepared,
    *,
    kept_step: int,
    scores: tuple[Evaluation | None, Evaluation | None],
    seconds: float,
    peak_memory: int,
) -> FinetuneResult:
    """Return the result of a run from its journal and the dev and test scores of the weights it kept."""
    steps, (dev, test), task = contents.steps, scores, prepared.task
    last = [record.loss for record in steps[-max(1, len(steps) // 10) :] if not record.skipped]
    start = next((line for line in contents.evaluations if line.step == 0), None)
    forwards = contents.forwards
    tokens = sum(
        contents.forwards_of(step) * sum(one.tokens for one in batch_of(prepared, config, step))
        for step in range(len(steps))
    )
    return FinetuneResult(
        method=choice.method.name,
        model=config.model,
        task=task.name,
        steps=len(steps),
        kept_step=kept_step,
        forwards=forwards,
        examples=round(forwards * config.batch_size),
        tokens=round(tokens),
        lr=choice.lr,
        lr_from=choice.lr_from,
        eps=choice.eps,
        eps_from=choice.eps_from,
        batch_size=config.batch_size,
        seed=config.seed,
        objective=config.objective,
        train_loss=sum(last) / len(last) if last else math.nan,
        eval_loss_start=start.loss if start else None,
        eval_loss=dev.loss if dev else None,
        metric_start=start.metric if start else None,
        metric=dev.metric if dev else None,
        metric_name=task.metric,
        test_loss=test.loss if test else None,
        test_metric=test.metric if test else None,
        skipped_steps=sum(record.skipped for record in steps),
        zero_slope_steps=sum(record.flat for record in steps),
        seconds=seconds,
        peak_memory_bytes=peak_memory,
        out=config.out,
        tuner=choice.used,
        journal=config.out / "journal",
        exact=config.exact,
        body=config.body,
        exact_lr=config.exact_lr,
    )


class EvalResult(_Result):
    """Scores of a model on one split."""

    model: str
    task: str
    split: str
    eval_loss: float
    metric: float | None
    metric_name: str
    examples: int
    tokens: int
    seconds: float
    peak_memory_bytes: int


class ReplayResult(_Result):
    """Weights rebuilt from a base and a journal; ``verified``: the run recorded their SHA-256 and it matches."""

    model: str
    journal: Path
    step: int
    sha256: str
    verified: bool
    out: Path
    seconds: float
