"""Configuration of a meta-training: one frozen, validated model, kept beside the result and in the card."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zoft.metatrain.evidence import CONTROLS, STRENGTHS, Rounds, rounds_within
from zoft.metatrain.gradient import Estimator
from zoft.model.adapters import Adapter, LoRASetting, Mode, PrefixSetting, single_adapter
from zoft.model.offload import DeviceMap
from zoft.optim import get_method
from zoft.tuner.features import Inputs
from zoft.tuner.networks import Activation, EffectiveSize, Granularity, RecurrentScale

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1e18)]

# The authors' method as published: |MLP| on raw inputs, plain SGD, slope and normaliser taken as constants.
PAPER: dict[str, Any] = {
    "granularity": ("block",),
    "inputs": "raw",
    "activation": "abs",
    "recurrent": "sigma",
    "estimator": "detached",
    "detach_normaliser": True,
    "relative": False,
    "tuner_optimizer": "sgd",
    "tuner_lr": 0.1,
    "learn_lr": False,
    "lr": 1e-6,
    "select_strength": False,
}


def adapter_rates(mode: Mode) -> dict[str, float]:
    """Return the defaults of rates and eps for an adapter: those published for MeZO and, for the teacher, for Adam.

    >>> adapter_rates("prefix")
    {'lr': 0.01, 'eps': 0.1, 'teacher_lr': 0.01}
    """
    mezo, adam = get_method("mezo").settings(mode), get_method("adam").settings(mode)
    return {"lr": mezo.lr, "eps": mezo.eps, "teacher_lr": adam.lr}


class MetatrainConfig(BaseModel):
    """Configuration of `zoft.metatrain.metatrain`; ``preset="paper"`` changes the defaults to `PAPER`.

    With ``lora`` or ``prefix`` the rates and eps have the defaults of `adapter_rates`.

    >>> MetatrainConfig(model="model-folder", tasks=("copa",), preset="paper").activation
    'abs'
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    # Names by which files know a setting, and its name here: jobs and cards of earlier versions are read and compared.
    STORED_AS: ClassVar[dict[str, str]] = {"directions": "probes"}

    model: str = Field(description="Hub id, local folder or .gguf file")
    tasks: Annotated[tuple[str, ...], Field(validate_default=True)] = Field((), description="built-in tasks")
    data: Path | None = Field(
        None, description="with `tasks`: folder of NAME/{train,dev,test}.jsonl; without: your file or folder"
    )
    lora: LoRASetting = Field(None, description="for LoRA adapters: true, or any of rank, alpha, targets")
    prefix: PrefixSetting = Field(None, description="for prefixes: true, or how many tokens")
    preset: Literal["zoft", "paper"] = Field("zoft", description="defaults: zoft, or paper (the method as published)")
    steps: Annotated[int, Field(ge=0)] = Field(400, description="points of the trajectories; 0: an untrained tuner")
    reset_every: Count = Field(40, description="points between resets to the base")
    batch_size: Count = Field(8, description="examples per point")
    lr: Rate = Field(1e-5, description="learning rate of the zeroth-order steps; a start, where it is learned")
    learn_lr: bool = Field(True, description="learn that rate with the tuner")
    eps: Rate = Field(1e-3, description="probe radius")
    probes: Count = Field(1, description="zeroth-order steps tried from each point")
    estimator: Estimator = Field("control_variate", description="of the meta-gradient")
    meta_batch: Literal["same", "fresh"] = Field(
        "same", description="of the loss after a step: the teacher's, or the one that comes next (no control variate)"
    )
    detach_normaliser: bool = Field(False, description="take the normaliser as a constant in the meta-gradient")
    relative: bool = Field(True, description="divide each meta-gradient by the length it has without curvature")
    teacher: Literal["adam", "adam8bit", "sgd"] = Field(
        "adam", description="of the trajectories; adam8bit: moments of a byte each (bitsandbytes); sgd: momentum 0.8"
    )
    teacher_lr: Rate = Field(1e-5, description="learning rate of the teacher, which takes the first-order trajectories")
    tuner_optimizer: Literal["adam", "sgd"] = Field("adam", description="of the networks")
    tuner_lr: Rate = Field(0.05, description="learning rate of the networks")
    pull: Annotated[float, Field(ge=0)] = Field(
        1.0, description="pull of the scales back to their start (Adam only): no logarithm ends beyond 1 / pull of it"
    )
    residual_pull: Annotated[float, Field(ge=0)] = Field(
        4.0, description="the same for what sets a block apart from its kind"
    )
    granularity: tuple[Granularity, ...] = Field(
        ("kind", "block"),
        description="levels of the networks: one or two of kind, layer, block, with a comma; two are added",
    )
    inputs: Inputs = Field("scaled", description="of the networks: scaled, or raw as published")
    activation: Activation = Field("exp", description="of the networks: exp, or abs as published")
    hidden: Annotated[int, Field(ge=1, le=1024)] = Field(64, description="width of the networks")
    recurrent: RecurrentScale = Field("s", description="scale that a step hands on: s, or raw sigma as published")
    effective_size: EffectiveSize = Field(
        "full", description="how the normaliser counts an untied input embedding; none: no normaliser"
    )
    warm_start: Literal["none", "energy", "signal"] = Field(
        "none", description="start each kind from its gradient energy, or from its signal over its Fisher trace"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of noise, batches, data and networks")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="dtype of the computation: auto, fp32, or bf16 (autocast); the teacher's weights are always fp32",
    )
    checkpoint_activations: bool = Field(
        False, description="compute activations again in a backward pass; saves their memory, costs a third of its time"
    )
    device: str = Field("auto", description="device: auto (a GPU if there is one), cpu, cuda, cuda:1 ..")
    device_map: DeviceMap | None = Field(
        None,
        description="spread a model over GPUs, host memory and disk: auto, disk, or devices by module (see accelerate)",
    )
    train_size: Count = Field(1000, description="training rows of each task used at most")
    dev_size: Count | None = Field(None, description="held-out rows used at most; default: the task's own")
    eval_batch_size: Count = Field(16, description="examples evaluated together; changes memory, not scores")
    compare_every: Annotated[int, Field(ge=0)] = Field(
        10, description="points between comparisons with sigma = 1 at the same noise; 0: none"
    )
    evidence: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="forward passes of the runs that test the tuner, at most a third of the meta-training; 0: none; "
        "default: a third",
    )
    evidence_task: str | None = Field(
        None, description="built-in task of the runs that test the tuner; default: held-out rows of the first task"
    )
    evidence_seeds: Count = Field(1, description="seeds of those runs")
    select_strength: bool = Field(True, description="lower the tuner's strength if the evidence favours it")
    out: Path | None = Field(None, description="card file; default: <model>.tuner.safetensors")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Fill in what preset, adapter and a fresh batch imply; values given by the caller win."""
        if not isinstance(values, dict):
            return values
        values = cls.renamed(values)
        implied: dict[str, Any] = {"estimator": "exact"} if values.get("meta_batch") == "fresh" else {}
        implied |= PAPER if values.get("preset") == "paper" else {}
        for mode in get_args(Mode):
            if mode != "full" and values.get(mode) not in (None, False):
                implied |= adapter_rates(mode)
        return implied | values

    @field_validator("tasks", "granularity", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> "MetatrainConfig":
        if not self.tasks and self.data is None and self.steps:
            raise ValueError("neither task nor data: name a built-in task or give your own data")
        if twice := sorted({task for task in self.tasks if self.tasks.count(task) > 1}):
            raise ValueError(f"task {twice[0]} is named twice")
        if not 1 <= len(self.granularity) <= 2 or len(set(self.granularity)) != len(self.granularity):
            raise ValueError(
                f"granularity is {','.join(self.granularity) or 'empty'}: one or two of kind, layer, block"
            )
        if self.meta_batch == "fresh" and self.estimator == "control_variate":
            raise ValueError("meta_batch fresh has no control variate: leave estimator out, or take exact or detached")
        single_adapter(self.lora, self.prefix)
        if self.warm_start != "none" and self.activation != "exp":
            raise ValueError(f"warm_start {self.warm_start} needs activation exp: it sets the logarithms of the scales")
        if self.evidence_task is not None and self.evidence_task in self.tasks:
            raise ValueError(f"evidence_task {self.evidence_task} is one of the tasks; name one held out")
        return self

    @classmethod
    def renamed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``values`` with the keys of `STORED_AS` replaced; a value under the present name wins.

        >>> MetatrainConfig.renamed({"directions": 4, "steps": 9})
        {'probes': 4, 'steps': 9}
        """
        stored = {cls.STORED_AS[key]: value for key, value in values.items() if key in cls.STORED_AS}
        return stored | {key: value for key, value in values.items() if key not in cls.STORED_AS}

    def stored(self, *, without: Collection[str] = ()) -> dict[str, Any]:
        """Return the settings as JSON values under the names that files have, but for those ``without``."""
        names = {name: stored for stored, name in self.STORED_AS.items()}
        values = self.model_dump(mode="json", exclude=set(without))
        return {names.get(key, key): value for key, value in values.items()}

    @property
    def adapter(self) -> Adapter | None:
        """The adapter around the base; None where the tuner is for all weights."""
        return single_adapter(self.lora, self.prefix)

    @property
    def card_file(self) -> Path:
        """File of the card."""
        if self.out is not None:
            return self.out
        name = Path(self.model).name.removesuffix(".gguf") or "model"
        return Path(f"{name}.tuner.safetensors")

    @property
    def forwards_per_step(self) -> int:
        """Forwards of one point: probes, the loss after each, the teacher's step; a backward counts two.

        A fresh batch is evaluated once more, before the step.
        """
        return 5 * self.probes + 3 + (self.meta_batch == "fresh")

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths at which the tuner competes in the evidence."""
        return STRENGTHS if self.select_strength else (1.0,)

    @property
    def evidence_budget(self) -> int:
        """Forwards that the evidence may take: ``evidence``, at most a third of the meta-training."""
        third = self.steps * self.forwards_per_step // 3
        return third if self.evidence is None else min(self.evidence, third)

    @property
    def evidence_rounds(self) -> Rounds | None:
        """The rounds of the evidence that stay within the budget; None if it is too small for any."""
        return rounds_within(self.evidence_budget, len(self.strengths) + CONTROLS, self.evidence_seeds)
