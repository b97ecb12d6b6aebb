"""The methods by name, with their parts, their sources and published settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic.fields import FieldInfo

from zoft.errors import ConfigError
from zoft.model.adapters.settings import Mode
from zoft.optim.core.groups import Parameters
from zoft.optim.core.lowrank import LOZO, SubZero, TeZO
from zoft.optim.core.optimizer import ZOOptimizer
from zoft.optim.core.parts import Directions, Part, Projection, Rule, known_options
from zoft.optim.methods.adam import AdamSteps, ScalarAdam
from zoft.optim.methods.adamu import MomentumNoise, UncertainSteps
from zoft.optim.methods.conservative import Conservative
from zoft.optim.methods.dap import Aligned
from zoft.optim.methods.dizo import DiZO, FirstOrderDiZO
from zoft.optim.methods.first_order import FORWARDS, SGD, Adam
from zoft.optim.methods.fzoo import Signs, SpreadSteps
from zoft.optim.methods.hizoo import Curvature
from zoft.optim.methods.ldsd import LearnedMean
from zoft.optim.methods.lezo import Layers
from zoft.optim.methods.lozo_m import LOZOMomentum
from zoft.optim.methods.mezo import MeZO
from zoft.optim.methods.momentum import Momentum
from zoft.optim.methods.muon import Orthogonal, Subspace
from zoft.optim.methods.sign import Sign
from zoft.optim.methods.sparse import SmallWeights
from zoft.optim.methods.svrg import SVRG
from zoft.optim.methods.zoft import ZOFineTuner

_KINDS: dict[str, type[Part]] = {"directions": Directions, "rule": Rule, "projection": Projection}


# Learning rate and eps for adapters. MeZO's and Adam's are of MeZO's table (arXiv 2305.17333); that of ZO-AdaMU is of
# its own script, for LoRA. ZO-Muon's are ours: its steps have the spectral norm of its rate, whatever the block.
_ADAPTERS: dict[Mode, dict[str, tuple[float, float]]] = {
    "lora": {"mezo": (1e-4, 1e-2), "adam": (1e-4, 1e-8), "zo-adamu": (1e-4, 1e-2), "zo-muon": (1e-2, 1e-2)},
    "prefix": {"mezo": (1e-2, 1e-1), "adam": (1e-2, 1e-8), "zo-muon": (1e-1, 1e-1)},
}


@dataclass(frozen=True)
class Method:
    """A method that ``--method`` takes; ``lr``, ``eps`` and ``probes`` are its published defaults for full fine-tuning.

    ``eps`` of a first-order method is no probe radius, but what Adam adds to the root of the second moment.

    Attributes:
        optimizer: the class that the parts are given to.
        parts: directions, rule, projection: those that are not MeZO's.
        presets: settings of the parts that are not the parts' own defaults.
    """

    name: str
    optimizer: type[ZOOptimizer]
    summary: str
    source: str
    lr: float = 1e-6
    eps: float = 1e-3
    probes: int = 1
    parts: tuple[type[Part], ...] = ()
    presets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tuned(self) -> bool:
        """Whether a tuner drives it."""
        return issubclass(self.optimizer, ZOFineTuner)

    @property
    def first_order(self) -> bool:
        """Whether it takes gradients: an upper bound, whose records replay nothing."""
        return self.optimizer.needs_gradient

    def published(self, mode: Mode) -> tuple[float, float]:
        """Return learning rate and eps for training all weights, LoRA or prefixes.

        Where none was published for adapters, those for all weights move as MeZO's do: eps by a factor of 10 or 100,
        the learning rate by 100 or 10,000. The rate of steps with a length of their own (Adam's, signs ..) and of steps
        along the gradient moves as Adam's does, by 10 or 1,000.

        >>> get_method("mezo").published("lora"), get_method("hizoo").published("prefix")
        ((0.0001, 0.01), (0.01, 0.1))
        """
        if mode == "full":
            return self.lr, self.eps
        known = _ADAPTERS[mode]
        if self.name in known:
            return known[self.name]
        like = METHODS["adam" if self.first_order or self.scale_free else "mezo"]
        lr, eps = known[like.name][0] / like.lr, known["mezo"][1] / METHODS["mezo"].eps
        return float(f"{self.lr * lr:.3g}"), self.eps if self.first_order else float(f"{self.eps * eps:.3g}")

    @property
    def scale_free(self) -> bool:
        """Whether the length of a step does not depend on that of the slopes."""
        return any(issubclass(part, (AdamSteps, ScalarAdam, Sign, SpreadSteps)) for part in self.parts)

    @property
    def applier(self) -> type[ZOOptimizer]:
        """The optimizer that applies records of this method: they hold the scales, so that no tuner is needed."""
        return MeZO if self.tuned else self.optimizer

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The options of the parts by name."""
        return {name: info for part in self.parts for name, info in part.model_fields.items()}

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return every option with its value, of those ``given`` and the defaults.

        Raises:
            ConfigError: an option that the method does not have, or a value that does not fit.

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

    def forwards(self, probes: int, steps: int, options: Mapping[str, Any], whole: float) -> float:
        """Return the forward passes of ``steps`` steps; ``whole``: of a pass over all training examples.

        >>> get_method("mezo-svrg").forwards(1, 4, {"refresh": 2}, whole=50)
        208
        """
        if self.first_order:
            return steps * FORWARDS
        parts = self.make_parts(options)
        directions, rule = parts.get("directions", Directions()), parts.get("rule", Rule())
        projection = parts.get("projection")
        taken: float = rule.forwards(probes, steps, directions.forwards(probes), whole)
        return taken + (projection.forwards(steps) if projection is not None else 0)

    def make(self, params: Parameters, *, options: Mapping[str, Any] | None = None, **settings: Any) -> ZOOptimizer:
        """Return the optimizer of this method: ``settings`` as for `ZOOptimizer`, its published ones by default.

        >>> import torch
        >>> get_method("mezo-momentum").make(torch.nn.Linear(2, 1), lr=1e-3, options={"beta": 0.5}).rule
        Momentum(beta=0.5, heavy_ball=False)
        """
        published = {"lr": self.lr, "eps": self.eps, "probes": self.probes}
        parts = self.make_parts(self.options(options or {}))
        return self.optimizer(params, **published | parts | settings)

    def _made(self, given: Mapping[str, Any]) -> dict[str, Part]:
        values = {**self.presets, **given}
        made = {}
        for part in self.parts:
            (kind,) = (kind for kind, base in _KINDS.items() if issubclass(part, base))
            made[kind] = part(**{name: value for name, value in values.items() if name in part.model_fields})
        return made


METHODS = {
    method.name: method
    for method in [
        Method("mezo", MeZO, "zeroth-order SGD along isotropic directions", "arXiv 2305.17333"),
        Method(
            "mezo-momentum", ZOOptimizer, "MeZO with momentum; d numbers more", "arXiv 2305.17333", parts=(Momentum,)
        ),
        Method(
            "mezo-adam", ZOOptimizer, "Adam on MeZO's estimate; 2d numbers more", "arXiv 2305.17333", 1e-5,
            parts=(AdamSteps,),
        ),
        Method(
            "scalar-adam", ZOOptimizer, "MeZO over the root mean square of its slopes", "arXiv 2605.03869", 1e-5,
            parts=(ScalarAdam,),
        ),
        Method("zo-sign", ZOOptimizer, "every weight moves by lr", "arXiv 2402.11592", parts=(Sign,)),
        Method(
            "zo-conservative", ZOOptimizer, "a step forth, back or none: the best of three", "arXiv 2402.11592",
            parts=(Conservative,),
        ),
        Method("lezo", ZOOptimizer, "MeZO on a random subset of the layers", "arXiv 2410.09823", parts=(Layers,)),
        Method(
            "sparse-mezo", ZOOptimizer, "MeZO on the smaller weights of every block", "arXiv 2402.15751",
            parts=(SmallWeights,),
        ),
        Method("lozo", ZOOptimizer, "directions of low rank, U V^T", "arXiv 2410.07698", parts=(LOZO,)),
        Method(
            "lozo-m", ZOOptimizer, "LOZO with momentum in the left factor", "arXiv 2410.07698",
            parts=(LOZO, LOZOMomentum),
        ),
        Method(
            "subzero", ZOOptimizer, "directions in random orthonormal subspaces", "arXiv 2410.08989", 1e-7,
            parts=(SubZero,),
        ),
        Method(
            "tezo", ZOOptimizer, "directions of low rank over space and time", "arXiv 2501.19057", parts=(TeZO,)
        ),
        Method(
            "fzoo", ZOOptimizer, "one-sided signs, steps in units of the losses' spread", "arXiv 2506.09034",
            5e-5, 1e-4, 8, parts=(Signs, SpreadSteps),
        ),
        Method(
            "zo-adamu", ZOOptimizer, "momentum in the perturbation", "arXiv 2312.15184",
            parts=(MomentumNoise, UncertainSteps),
        ),
        Method(
            "hizoo", ZOOptimizer, "directions scaled by a diagonal curvature", "arXiv 2402.15173", parts=(Curvature,)
        ),
        Method(
            "mezo-svrg", ZOOptimizer, "variance reduced by full-batch estimates", "arXiv 2404.08080", parts=(SVRG,)
        ),
        Method(
            "zo-dap", ZOOptimizer, "probes of fixed length along an estimate of the gradient", "arXiv 2510.19975",
            parts=(Aligned,),
        ),
        Method(
            "zo-muon", ZOOptimizer, "the estimate in a subspace, orthogonalised", "arXiv 2602.17155", 1e-2, probes=4,
            parts=(Subspace, Orthogonal),
        ),
        Method(
            "zo-ldsd", ZOOptimizer, "the best of K directions whose mean is learned online", "arXiv 2602.13659",
            probes=5, parts=(LearnedMean,),
        ),
        Method(
            "dizo", ZOOptimizer, "MeZO, the displacement of query and value rescaled every 50 steps",
            "arXiv 2502.03304", parts=(DiZO,),
        ),
        Method(
            "dizo-fo", ZOOptimizer, "DiZO whose rescaling is found by backpropagation", "arXiv 2502.03304",
            parts=(FirstOrderDiZO,),
        ),
        Method(
            "zoft", ZOFineTuner, "MeZO along directions whose blocks a learned tuner scales (--tuner)",
            "arXiv 2510.00419",
        ),
        Method("adam", Adam, "first-order bound: Adam, all weights", "arXiv 1412.6980", lr=1e-5, eps=1e-8),
        Method("sgd", SGD, "first-order bound: SGD, all weights", "arXiv 2305.17333", lr=1e-3, eps=1e-8),
    ]
}  # fmt: skip


def get_method(name: str) -> Method:
    """Return the method called ``name``; an unknown name is a `ConfigError` that lists what there is.

    Names joined by ``+`` are a combination of their parts, with the published settings of the first.

    >>> [part.__name__ for part in get_method("lezo+mezo-adam").parts]
    ['Layers', 'AdamSteps']
    """
    names = name.split("+")
    for one in names:
        if one not in METHODS:
            close = difflib.get_close_matches(one, METHODS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"no method {one!r}; {hint}There are: {', '.join(METHODS)}")
    return METHODS[name] if len(names) == 1 else _combined(name, [METHODS[one] for one in names])


def _combined(name: str, methods: list[Method]) -> Method:
    for kind, base in _KINDS.items():
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
        next((method.optimizer for method in methods if method.tuned), ZOOptimizer),
        " with ".join(method.summary for method in methods),
        ", ".join(dict.fromkeys(method.source for method in methods)),
        first.lr,
        first.eps,
        max(method.probes for method in methods),
        parts,
        {key: value for method in methods for key, value in method.presets.items()},
    )
