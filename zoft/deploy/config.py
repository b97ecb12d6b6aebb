"""Configurations of stage two: one frozen, validated model for each job, written beside its result.

The command line shows descriptions and defaults; where None stands for one, it follows ``; default:``. After a change:
`make docs`.
"""

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zoft.errors import ConfigError
from zoft.model import adapters
from zoft.model.adapters import Adapter, LoRASetting, PrefixSetting
from zoft.model.offload import DeviceMap
from zoft.optim import METHODS, get_method
from zoft.tasks import get_task

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    Field(description="dtype of the weights: auto (as stored), fp32, bf16 or fp16"),
]
Device = Annotated[str, Field(description="device: auto (a GPU if there is one), cpu, cuda, cuda:1 ..")]
_DATE = "date that a chat template may write into conversations, YYYY-MM-DD; default: today"
_DEVICE_MAP = "spread a model over GPUs, host memory and disk: auto, disk, or devices by module (see accelerate)"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str = Field(description="Hub id, local folder or .gguf file")
    task: str | None = Field(None, description="built-in task, see `zoft tasks`; without it, `data` is your own")
    data: Path | None = Field(
        None, description="with `task`: folder of NAME/{train,dev,test}.jsonl; without: your file or folder"
    )


class FinetuneConfig(_Config):
    """Configuration of `zoft.deploy.finetune`; the defaults run on a CPU.

    >>> FinetuneConfig(model="model-folder", task="sst2").steps
    1000
    """

    method: str | None = Field(
        None, description="optimization method, see `zoft methods`; default: zoft if a tuner fits, else mezo"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="of the method, by name (options.rank=4), see docs/methods.md"
    )
    tuner: str | None = Field(
        None,
        description="tuner card: a file, the first characters of its digest, ORG/NAME[@REVISION] on the Hub, or auto "
        "(the best that fits); implies method zoft",
    )
    trust: bool = Field(
        False,
        description="let auto use cards of every publisher on the Hub, not only of those that the model names",
    )
    exact: Literal["none", "head"] = Field(
        "none", description="blocks that move along their exact gradient: none, or head (with its bias and final norm)"
    )
    body: Literal["zo", "frozen"] = Field(
        "zo", description="what becomes of the other blocks: zo (the method trains them), or frozen"
    )
    exact_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of exact blocks; default: 2e-3 for the rows of answers, 1e-4 for all rows"
    )
    lora: LoRASetting = Field(None, description="train LoRA adapters: true, or any of rank, alpha, targets")
    prefix: PrefixSetting = Field(None, description="train prefixes: true, or their number of tokens")
    steps: Count = Field(1000, description="optimizer steps")
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate; default: the card's, else the method's own"
    )
    eps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="probe radius; default: the card's, else the method's own"
    )
    batch_size: Count = Field(16, description="examples per batch")
    accumulate: Count = Field(1, description="micro-batches that a batch is evaluated in; saves memory only")
    probes: Count | None = Field(None, description="directions per step, q; default: the method's own, mostly 1")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="learning rate over the steps: constant or linear"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled weight decay; not on norms and biases"
    )
    objective: Literal["loss", "accuracy", "f1", "em", "custom"] = Field(
        "loss", description="what is minimised (1 - metric); custom: a callable given to zoft.deploy.finetune"
    )
    seed: Seed = Field(0, description="seed of data sampling, batches and noise")
    date: datetime.date | None = Field(None, description=_DATE)
    dtype: Dtype = "auto"
    master_weights: bool = Field(False, description="keep a float32 copy of half-precision weights")
    device: Device = "auto"
    device_map: DeviceMap | None = Field(None, description=_DEVICE_MAP)
    graphs: bool = Field(False, description="measure by captured CUDA graphs (mezo, zoft)")
    eval_every: Count | None = Field(None, description="steps between dev evaluations; default: steps / 10")
    snapshot_every: Count | None = Field(None, description="steps between snapshots; default: as `eval_every`")
    shots: Count | None = Field(
        None,
        description="train and dev rows of every class, K each, drawn from train by `seed`; `train_size` and "
        "`dev_size` are then ignored",
    )
    train_size: Count = Field(1000, description="training rows used at most")
    dev_size: Count | None = Field(None, description="dev rows used at most; default: the task's own, 500 or 100")
    test_size: Count = Field(1000, description="test rows used at most")
    eval_batch_size: Count = Field(16, description="examples evaluated together; changes memory, not scores")
    log_displacement: bool = Field(
        False, description="log |theta - theta_0| of every block with dev evaluations; keeps a copy of the base"
    )
    keep_model: bool = Field(True, description="keep the fine-tuned checkpoint; without it, scores and journal stay")
    out: Path = Field(Path("runs/zoft"), description="run folder")

    @model_validator(mode="before")
    @classmethod
    def _with_the_methods_own(cls, values: Any) -> Any:
        """Fill in options and probes, so that a stored configuration does not depend on defaults that may change."""
        name = values.get("method") or ("zoft" if values.get("tuner") else None)
        options = values.get("options") or {}
        if not isinstance(options, dict):
            return values
        if not isinstance(name, str) or not all(part in METHODS for part in name.split("+")):
            if options:
                raise ValueError(f"options need a method, and the method is {name}: name one of {', '.join(METHODS)}")
            return values
        try:
            method = get_method(name)
            filled: dict[str, Any] = {"options": method.options(options)}
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if method.exact:
            filled["exact"] = "head"
        return {**values, **filled, "probes": values.get("probes") or method.probes}

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneConfig":
        if self.task is None and self.data is None:
            raise ValueError("neither task nor data: name a built-in task or give your own data")
        adapters.single_adapter(self.lora, self.prefix)
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate is {self.accumulate}, more than batch_size {self.batch_size}")
        if self.tuner is not None and self.method is not None and "zoft" not in self.method.split("+"):
            raise ValueError(f"method {self.method} takes no tuner: leave out one of the two, or take method zoft")
        self._check_exact()
        return self

    def _check_exact(self) -> None:
        if self.exact == "none":
            if self.body == "frozen" or self.exact_lr is not None:
                what = "body is frozen" if self.body == "frozen" else f"exact_lr is {self.exact_lr}"
                raise ValueError(f"{what} and exact is none, so nothing moves along an exact gradient: take exact head")
            return
        method = self.method or ""
        tuned = self.tuner is not None or "zoft" in method.split("+")
        for refused, why in (
            (
                self.objective != "loss",
                f"objective {self.objective} has no gradient by the logits, which exact head needs",
            ),
            (self.adapter is not None, "with an adapter the head is frozen, and has no use for its gradient"),
            (self.graphs, "graphs=true replays forward passes that give no gradient"),
            (self.body == "frozen" and tuned, "the body is frozen, so a tuner has no scales to give"),
            (method in METHODS and METHODS[method].first_order, f"method {method} has the gradient of every block"),
        ):
            if refused:
                raise ValueError(f"{why}: leave out one of the two")

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that is trained; None where all weights are."""
        return adapters.single_adapter(self.lora, self.prefix)

    @property
    def wanted_method(self) -> str | None:
        """The requested method: zoft where a tuner is named; None where the choice is left open."""
        if self.method is None and self.body == "frozen":
            return "mezo"
        return "zoft" if self.tuner is not None and self.method is None else self.method

    @property
    def q(self) -> int:
        """Directions per step; 1 where neither probes nor a method is named."""
        return self.probes or 1

    @property
    def most_rows(self) -> int:
        """Upper bound on training rows: shots times classes, where both are known."""
        classes = len(get_task(self.task).words) if self.task else 0
        return self.shots * classes if self.shots and classes else self.train_size

    @property
    def evaluation_interval(self) -> int:
        """Steps between dev evaluations."""
        return self.eval_every or max(1, self.steps // 10)

    def lr_factor(self, step: int) -> float:
        """Return what multiplies the learning rate at ``step`` (from 0): linear warm-up, then constant or linear to 0.

        >>> config = FinetuneConfig(model="m", task="sst2", steps=10, warmup=2, schedule="linear")
        >>> [config.lr_factor(step) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "linear":
            return (self.steps - step) / max(1, self.steps - self.warmup)
        return 1.0

    @property
    def snapshot_interval(self) -> int:
        """Steps between snapshots."""
        return self.snapshot_every or self.evaluation_interval


class EvalConfig(_Config):
    """Configuration of `zoft.deploy.evaluate_model`."""

    split: Literal["dev", "test"] = Field("test", description="split to evaluate on: dev or test")
    batch_size: Count = Field(16, description="examples evaluated together; changes memory, not scores")
    dtype: Dtype = "auto"
    device: Device = "auto"
    device_map: DeviceMap | None = Field(None, description=_DEVICE_MAP)
    shots: Count | None = Field(None, description="of the run that is evaluated on dev: rows per class")
    train_size: Count = Field(1000, description="training rows (decides which Hub rows are dev)")
    dev_size: Count | None = Field(None, description="dev rows used at most; default: the task's own")
    test_size: Count = Field(1000, description="test rows used at most")
    demonstrations: Annotated[int, Field(ge=0)] = Field(
        0, description="solved training rows before every prompt: in-context learning"
    )
    seed: Seed = Field(0, description="seed of data sampling")
    date: datetime.date | None = Field(None, description=_DATE)
