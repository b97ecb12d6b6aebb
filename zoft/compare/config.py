"""Configuration of a comparison: one frozen, validated model, the content of its YAML file."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from zoft.deploy import FinetuneConfig
from zoft.deploy.choice import AUTO
from zoft.deploy.config import Count
from zoft.errors import ConfigError
from zoft.model.adapters import Mode
from zoft.optim import get_method
from zoft.tasks import get_task

ZERO_SHOT, IN_CONTEXT = "zero-shot", "icl"
BASELINES = (ZERO_SHOT, IN_CONTEXT)  # scores of the base, without training

Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

# Settings of the runs that the comparison sets itself.
_FIXED = {"model", "task", "data", "method", "tuner", "steps", "lr", "seed", "batch_size", "keep_model", "out"}


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelSpec(_Config):
    """A model and its name in tables and folders; by default the last part of the Hub id or path."""

    model: str = Field(description="Hub id, local folder or .gguf file")
    name: str = Field("", description="name in tables and folders")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("model"), str) and not values.get("name"):
            return {**values, "name": Path(values["model"]).name.removesuffix(".gguf")}
        return values

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        return _name_of_file(name)


class MethodSpec(_Config):
    """A method with its settings: a row of the tables.

    ``lr`` are the first rates of its grid; by default the comparison's, else those of `zoft.compare.grid`. ``settings``
    are further settings of its runs, fields of `zoft.deploy.FinetuneConfig`.
    """

    method: str = Field(description="a method of `zoft methods`, zero-shot or icl")
    label: str = Field("", description="name in tables and folders; default: the method's")
    lr: Rates | None = Field(None, description="first learning rates")
    tuner: str | None = Field(None, description="tuner card of method zoft; default: auto")
    demonstrations: Count = Field(32, description="of icl: solved training rows before the question")
    settings: dict[str, Any] = Field({}, description="further settings of the runs")

    @model_validator(mode="before")
    @classmethod
    def _labelled(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("method"), str) and not values.get("label"):
            return {**values, "label": values["method"]}
        return values

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        try:
            return method if method in BASELINES else get_method(method).name
        except ConfigError as error:
            raise ValueError(f"{error}, {', '.join(BASELINES)}") from error

    @field_validator("label")
    @classmethod
    def _plain(cls, label: str) -> str:
        return _name_of_file(label)

    @model_validator(mode="after")
    def _consistent(self) -> "MethodSpec":
        if self.tuner is not None and "zoft" not in self.method.split("+"):
            raise ValueError(f"{self.label}: method {self.method} takes no tuner; leave it out, or use method zoft")
        if self.is_baseline and (self.lr or self.settings):
            raise ValueError(f"{self.label}: {self.method} takes no step, so it has no lr and no settings")
        return self

    @property
    def card(self) -> str | None:
        """The tuner card it names; None without a tuner, or if every run looks for the best card."""
        return None if self.tuner == AUTO else self.tuner

    @property
    def is_baseline(self) -> bool:
        """Whether it only scores the base, without training."""
        return self.method in BASELINES

    @property
    def is_zeroth_order(self) -> bool:
        """Whether its wins are counted: neither a baseline nor a first-order method, which is an upper bound."""
        return not self.is_baseline and not get_method(self.method).first_order


def _from_name(field: str) -> Any:
    return BeforeValidator(lambda value: {field: value} if isinstance(value, str) else value)


class CompareConfig(_Config):
    """Configuration of `zoft.compare.compare`.

    >>> config = CompareConfig(models=["base"], tasks=["sst2"], methods=["mezo", "adam"], budget=600)
    >>> [config.steps(method) for method in config.methods]
    [300, 200]
    """

    models: Annotated[tuple[Annotated[ModelSpec, _from_name("model")], ...], Field(min_length=1)]
    tasks: tuple[str, ...] = Field((), description="built-in tasks; without any, `data` is your own data")
    data: Path | None = Field(
        None, description="with `tasks`: folder of NAME/{train,dev,test}.jsonl; without: your file or folder"
    )
    methods: Annotated[tuple[Annotated[MethodSpec, _from_name("method")], ...], Field(min_length=1)]
    budget: Count = Field(description="forward passes of a run; a backward pass counts two")
    lr: Rates | None = Field(
        None, description="first learning rates of methods without their own; default: the published grids"
    )
    extensions: Annotated[int, Field(ge=0)] = Field(
        4, description="rates added at most at each end of a grid while the best is there, factor 3"
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field((0,), description="seeds, a run for each")
    batch_size: Count = Field(16, description="examples per batch")
    settings: dict[str, Any] = Field({}, description="further settings of all runs")
    out: Path = Field(Path("runs/compare"), description="folder of the comparison")

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            try:
                get_task(task)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return tasks

    @model_validator(mode="after")
    def _consistent(self) -> "CompareConfig":
        if not self.tasks and self.data is None:
            raise ValueError("neither tasks nor data: name built-in tasks or give your own data")
        for what, names in (
            ("models", [spec.name for spec in self.models]),
            ("tasks", list(self.tasks)),
            ("methods", [spec.label for spec in self.methods]),
            ("seeds", list(map(str, self.seeds))),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                how = {"models": "; give each its own name", "methods": "; give each its own label"}.get(what, "")
                raise ValueError(f"{what}: {twice[0]} is there {names.count(twice[0])} times, expected once{how}")
        _check_settings("settings", self.settings)
        for place, spec in enumerate(self.methods):
            _check_settings(f"methods.{place}.settings", spec.settings)
            self._check_runs(spec)
        return self

    def _check_runs(self, spec: MethodSpec) -> None:
        if spec.is_baseline:
            return
        try:
            probe = self.run(self.models[0], self.task_names[0], spec, lr=1.0, seed=0, steps=1)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, one['loc']))}: {one['msg'].removeprefix('Value error, ')}, found {one['input']!r}"
                for one in error.errors()
            ]
            raise ValueError(f"settings of {spec.label}: {'; '.join(problems)}") from error
        least = 1.0  # of a frozen body
        if probe.body == "zo":
            whole = probe.most_rows / probe.batch_size
            least = get_method(spec.method).forwards(probe.q, 1, probe.options, whole)
        if self.budget < least:
            raise ValueError(
                f"budget is {self.budget} forward passes, less than one step of {spec.label} takes; expected {least:g} "
                "or more"
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks; the user's own data is called by its file or folder."""
        return self.tasks or (_name_of_file(self.data.stem if self.data else ""),)

    def place(self, task: str) -> dict[str, Any]:
        """The settings of a run that locate the rows of ``task``."""
        return {"task": task if self.tasks else None, "data": self.data}

    def steps(self, spec: MethodSpec) -> int:
        """Steps of a run of ``spec``: as many as the budget pays for."""
        probe = self.run(self.models[0], self.task_names[0], spec, lr=1.0, seed=0, steps=1)
        whole = probe.most_rows / probe.batch_size  # with fewer rows a run takes less than its budget
        if probe.body == "frozen":
            return self.budget
        return get_method(spec.method).steps_within(probe.q, self.budget, probe.options, whole)

    def mode(self, spec: MethodSpec) -> Mode:
        """The weights that the runs of ``spec`` train: all, LoRA or prefixes."""
        adapter = self.run(self.models[0], self.task_names[0], spec, lr=1.0, seed=0, steps=1).adapter
        return "full" if adapter is None else adapter.mode

    def run(
        self, model: ModelSpec, task: str, spec: MethodSpec, *, lr: float, seed: int, steps: int | None = None
    ) -> FinetuneConfig:
        """The configuration of one run; its ``out`` is the caller's to set."""
        return FinetuneConfig(
            **{**self.settings, **spec.settings},
            **self.place(task),
            model=model.model,
            method=spec.method,
            tuner=(spec.tuner or AUTO) if get_method(spec.method).tuned else None,
            steps=self.steps(spec) if steps is None else steps,
            lr=lr,
            seed=seed,
            batch_size=self.batch_size,
            keep_model=False,
        )


def _check_settings(place: str, settings: dict[str, Any]) -> None:
    if fixed := sorted(_FIXED & set(settings)):
        raise ValueError(f"{place}.{fixed[0]}: the comparison sets it for each of its runs; leave it out here")


def _name_of_file(name: str) -> str:
    """Check that ``name`` can stand in the name of a file, between dots."""
    if not re.fullmatch(r"[\w@+-][\w@+.-]*", name):
        raise ValueError("expected a name of letters, digits and any of @ + . - _ (it is part of file names)")
    return name
