"""The methods by name, with their sources and published settings."""

import difflib
from dataclasses import dataclass

from zoft.errors import ConfigError
from zoft.optim.engine import ZOOptimizer
from zoft.optim.first_order import SGD, Adam
from zoft.optim.mezo import MeZO
from zoft.optim.tuner import ZOFineTuner


@dataclass(frozen=True)
class Method:
    """A method that ``--method`` takes; ``lr`` and ``eps`` are its published defaults for full fine-tuning.

    ``eps`` of a first-order method is no probe radius, but what Adam adds to the root of the second moment.
    """

    name: str
    optimizer: type[ZOOptimizer]
    summary: str
    source: str
    lr: float
    eps: float

    @property
    def tuned(self) -> bool:
        """Whether a tuner drives it."""
        return issubclass(self.optimizer, ZOFineTuner)

    @property
    def first_order(self) -> bool:
        """Whether it takes gradients: an upper bound, whose records replay nothing."""
        return self.optimizer.needs_gradient

    @property
    def applier(self) -> type[ZOOptimizer]:
        """The optimizer that applies records of this method: they hold the scales, so that no tuner is needed."""
        return MeZO if self.tuned else self.optimizer


METHODS = {
    method.name: method
    for method in [
        Method("mezo", MeZO, "zeroth-order SGD along isotropic directions", "arXiv 2305.17333", lr=1e-6, eps=1e-3),
        Method(
            "zoft",
            ZOFineTuner,
            "MeZO along directions whose blocks a learned tuner scales (--tuner)",
            "arXiv 2510.00419",
            lr=1e-6,
            eps=1e-3,
        ),
        Method("adam", Adam, "first-order bound: Adam, all weights", "arXiv 1412.6980", lr=1e-5, eps=1e-8),
        Method("sgd", SGD, "first-order bound: SGD, all weights", "arXiv 2305.17333", lr=1e-3, eps=1e-8),
    ]
}


def get_method(name: str) -> Method:
    """Return the method called ``name``; an unknown name is a `ConfigError` that lists what there is."""
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"no method {name!r}; {hint}There are: {', '.join(METHODS)}")
    return METHODS[name]
