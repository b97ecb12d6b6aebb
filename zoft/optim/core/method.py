"""`Method`: what ``--method`` takes, with its parts, its source and its published settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic.fields import FieldInfo

from zoft.errors import ConfigError
from zoft.optim.core.exact import ExactHead
from zoft.optim.core.first_order import FORWARDS, FirstOrder
from zoft.optim.core.groups import Parameters
from zoft.optim.core.optimizer import ZOOptimizer
from zoft.optim.core.parts import KINDS, Directions, Part, Rule, known_options
from zoft.weights.blocks import Mode


@dataclass(frozen=True)
class Published:
    """Settings that were published for causal models: learning rate, eps, and the grid of rates that was searched.

    ``eps`` of a first-order method is not a probe radius, but what Adam adds to the root of the second moment.
    """

    lr: float = 1e-6
    eps: float = 1e-3
    grid: tuple[float, ...] = ()


ZO_BENCH_GRID = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)  # arXiv 2402.11592, OPT-13B

# From all weights to adapters, as MeZO's own table goes (arXiv 2305.17333): factors of the learning rate, of the rate
# of steps with a length of their own or along the gradient (as Adam's goes), and of eps.
_FACTORS: dict[Mode, tuple[float, float, float]] = {"lora": (1e2, 1e1, 1e1), "prefix": (1e4, 1e3, 1e2)}


@dataclass(frozen=True)
class Method:
    """A method that ``--method`` takes.

    Attributes:
        parts: scales, directions, rule, projection: those that are not MeZO's.
        published: settings for training all weights, LoRA or prefixes; those of adapters may be left out.
        probes: directions of a step, published.
        presets: settings of the parts that are not the parts' own defaults.
        optimizer: the class that the parts are given to.
        tuned: whether a tuner gives its scales.
        exact: whether the head moves along its exact gradient.
    """

    name: str
    summary: str
    source: str
    parts: tuple[type[Part], ...] = ()
    published: Mapping[Mode, Published] = field(default_factory=lambda: {"full": Published()})
    probes: int = 1
    presets: Mapping[str, Any] = field(default_factory=dict)
    optimizer: type[ZOOptimizer] | type[FirstOrder] = ZOOptimizer
    tuned: bool = False
    exact: bool = False

    @property
    def first_order(self) -> bool:
        """Whether it takes gradients: an upper bound, whose records replay nothing."""
        return issubclass(self.optimizer, FirstOrder)

    @property
    def scale_free(self) -> bool:
        """Whether the length of a step does not depend on that of the slopes."""
        return any(issubclass(part, Rule) and part.scale_free for part in self.parts)

    def settings(self, mode: Mode = "full") -> Published:
        """Return learning rate, eps and grid for training all weights, LoRA or prefixes.

        Where none were published for adapters, those for all weights move as MeZO's do: eps by a factor of 10 or 100,
        the learning rate by 100 or 10,000. The rate of steps with a length of their own (Adam's, signs ..) and of steps
        along the gradient moves as Adam's does, by 10 or 1,000.

        >>> from zoft.optim import get_method
        >>> get_method("mezo").settings("lora"), get_method("hizoo").settings("prefix")
        (Published(lr=0.0001, eps=0.01, grid=(5e-05, 0.0001)), Published(lr=0.01, eps=0.1, grid=()))
        """
        if mode in self.published:
            return self.published[mode]
        full, (by_slope, by_step, eps) = self.published["full"], _FACTORS[mode]
        lr = by_step if self.first_order or self.scale_free else by_slope
        return Published(_rounded(full.lr * lr), full.eps if self.first_order else _rounded(full.eps * eps))

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The options of the parts by name."""
        return {name: info for part in self.parts for name, info in part.model_fields.items()}

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return every option with its value, of those ``given`` and the defaults.

        Raises:
            ConfigError: an option that the method does not have, or a value that does not fit.

        >>> from zoft.optim import get_method
        >>> get_method("lezo").options({"keep": "0.5"})
        {'keep': 0.5}
        """
        if unknown := [name for name in given if name not in self.fields]:
            words = known_options(self.fields, unknown[0])
            raise ConfigError(f"method {self.name} has no option {unknown[0]!r}; {words}")
        values: dict[str, Any] = {}
        for part in self._made(given).values():
            values |= part.model_dump(mode="json")
        return values

    def make_parts(self, given: Mapping[str, Any], *, steps: int | None = None) -> dict[str, Any]:
        """Return the parts as arguments of the optimizer; ``steps`` is the length of the run, which some need."""
        length = {"total_steps": steps} if steps is not None and "total_steps" in self.fields else {}
        return self._made({**length, **{name: value for name, value in given.items() if value is not None}})

    def forwards(self, probes: int, steps: int, options: Mapping[str, Any] | None = None, whole: float = 1.0) -> float:
        """Return the forward passes of the first ``steps`` steps of a run; a backward pass counts two.

        ``whole`` is the cost of a pass over all training examples, n / B.

        >>> from zoft.optim import get_method
        >>> get_method("mezo").forwards(4, 10), get_method("adam").forwards(1, 10)
        (80, 30)
        >>> get_method("mezo-svrg").forwards(1, 4, {"refresh": 2}, whole=50)
        208
        """
        if self.first_order:
            return steps * FORWARDS
        parts = self.make_parts(options or {})
        directions, rule = parts.get("directions", Directions()), parts.get("rule", Rule())
        projection = parts.get("projection")
        taken: float = rule.forwards(probes, steps, directions.forwards(probes), whole)
        return taken + (projection.forwards(steps) if projection is not None else 0)

    def steps_within(
        self, probes: int, budget: int, options: Mapping[str, Any] | None = None, whole: float = 1.0
    ) -> int:
        """Return the largest number of steps within ``budget`` forward passes; 0 where one step takes more.

        >>> from zoft.optim import get_method
        >>> get_method("adam").steps_within(1, 100)
        33
        """
        low, high = 0, budget  # a step takes at least one
        while low < high:
            middle = (low + high + 1) // 2
            if self.forwards(probes, middle, options, whole) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def make(
        self, params: Parameters, *, options: Mapping[str, Any] | None = None, **settings: Any
    ) -> ZOOptimizer | FirstOrder:
        """Return the optimizer of this method: ``settings`` as for `ZOOptimizer`, its published ones by default.

        >>> import torch
        >>> from zoft.optim import get_method
        >>> get_method("mezo-momentum").make(torch.nn.Linear(2, 1), lr=1e-3, options={"beta": 0.5}).rule
        Momentum(beta=0.5, heavy_ball=False)
        """
        full = self.settings()
        published = {"lr": full.lr, "eps": full.eps, "probes": self.probes}
        parts = self.make_parts(self.options(options or {}))
        if self.exact and isinstance(params, torch.nn.Module):
            parts["exact"] = ExactHead(model=params)
        return self.optimizer(params, **published | parts | settings)

    def _made(self, given: Mapping[str, Any]) -> dict[str, Part]:
        values = {**self.presets, **given}
        made = {}
        for part in self.parts:
            (kind,) = (kind for kind, base in KINDS.items() if issubclass(part, base))
            made[kind] = part(**{name: value for name, value in values.items() if name in part.model_fields})
        return made


def combined(name: str, methods: list[Method]) -> Method:
    """Return the method whose parts are those of all ``methods``, with the published settings of the first.

    Raises:
        ConfigError: two of them have the same kind of part, or an option of the same name.
    """
    for kind, base in KINDS.items():
        having = [method.name for method in methods if any(issubclass(part, base) for part in method.parts)]
        if len(having) > 1:
            raise ConfigError(f"{' and '.join(having)} cannot be combined: each has its own {kind}")
    parts = tuple(part for method in methods for part in method.parts)
    names = [option for part in parts for option in part.model_fields]
    if twice := sorted({option for option in names if names.count(option) > 1}):
        raise ConfigError(f"{name}: two of its parts have an option {twice[0]!r}; combine them from Python")
    first = methods[0]
    return Method(
        name,
        " with ".join(method.summary for method in methods),
        ", ".join(dict.fromkeys(method.source for method in methods)),
        parts,
        {"full": replace(first.published["full"], grid=())},
        max(method.probes for method in methods),
        {key: value for method in methods for key, value in method.presets.items()},
        tuned=any(method.tuned for method in methods),
        exact=any(method.exact for method in methods),
    )


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")
