"""First-order training of all weights: Adam and SGD, the upper bounds that zeroth-order methods are measured against.

They are no zeroth-order methods: a step takes one forward and one backward pass (counted as two forwards more), all
gradients at once and, for Adam, two moments of every weight. The loop of `zoft.deploy` drives them as it drives the
others. A record holds no gradient, so a run is resumed by taking the steps since a snapshot again, and not replayed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from zoft.errors import ConfigError, RunError
from zoft.optim.core.groups import Parameters
from zoft.optim.core.optimizer import ZOOptimizer
from zoft.optim.core.oracle import Closure, read
from zoft.optim.core.record import Record, StepRecord
from zoft.weights.dtypes import HALF

FORWARDS = 3  # of a step: one, and two for the backward pass


def adam_(
    theta: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Update ``theta`` and its moments in place (arXiv 1412.6980, algorithm 1); ``step`` counts from 1.

    >>> theta, zeros = torch.ones(1), torch.zeros(2, 1)
    >>> adam_(theta, torch.tensor([5.0]), zeros[0], zeros[1], step=1, lr=0.1)
    >>> round(theta.item(), 6)  # the first step has the length of lr, whatever the gradient
    0.9
    """
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (second / (1 - betas[1] ** step)).sqrt_().add_(eps)
    theta.addcdiv_(first, root, value=-lr / (1 - betas[0] ** step))


class FirstOrder(ZOOptimizer):
    """A step from the gradient of all blocks; a subclass gives the rule.

    ``closure`` follows the habit of `torch.optim`: it computes the loss, calls ``backward`` and returns the loss.
    Half-precision weights are updated in a float32 copy (optimizer state), as mixed-precision training does.

    Args:
        params, lr, weight_decay, seed, journal: as for `ZOOptimizer`.
        eps: Adam's, added to the root of the second moment; SGD has no use for it.
        probes: 1; there is nothing to probe.
        master_weights: has no effect, half-precision weights always have their float32 copy.
    """

    needs_gradient = True

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float,
        eps: float = 1e-8,
        probes: int = 1,
        weight_decay: float = 0.0,
        seed: int = 0,
        master_weights: bool = False,
        journal: Callable[[Record], None] | None = None,
    ) -> None:
        if probes != 1:
            raise ConfigError(f"probes is {probes}: a first-order method takes one gradient a step and probes nothing")
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay, seed=seed, journal=journal)

    def verify(self, closure: Closure) -> str | None:
        """Nothing is perturbed, so there is nothing to check."""
        self._verified = True
        return None

    def measure(self, closure: Closure) -> StepRecord:
        """Evaluate ``closure``, which leaves the gradients with the parameters; the record has the gradient's norm."""
        self.zero_grad()
        with torch.enable_grad():
            loss = float(torch.as_tensor(closure()).detach())
        squares = read([block.parameter.grad.double().square().sum() for block in self._moving()])
        group = self.param_groups[0]
        return StepRecord(
            step=group["step"],
            seed=group["seed"],
            lr=tuple(float(g["lr"]) for g in self.param_groups),
            eps=group["eps"],
            losses=((loss, loss),),
            extra={"gradient": math.sqrt(sum(squares))},
            forwards=FORWARDS,
        )

    @torch.no_grad()
    def apply(self, record: Record) -> None:
        """Update the weights by the gradients that `measure` left, and drop these.

        Raises:
            RunError: there are none: a record of a first-order step moves nothing by itself.
        """
        step = self.param_groups[0]["step"]
        if not isinstance(record, StepRecord) or record.step != step:
            raise ConfigError(f"the record is of step {record.step}, the optimizer is at step {step}")
        if not record.skipped:
            if not self._moving():
                raise RunError(f"step {step} is first-order, and its gradient is gone: it has to be measured again")
            self._apply(record)
        self.zero_grad()
        for group in self.param_groups:
            group["step"] = step + 1

    def _apply(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                theta = self._exact(parameter)
                if group["weight_decay"] and parameter.ndim > 1:
                    theta.mul_(1 - lr * group["weight_decay"])
                self._rule(parameter, theta, parameter.grad.to(theta.dtype), record, lr)
                parameter.copy_(theta)

    def _rule(
        self, parameter: torch.Tensor, theta: torch.Tensor, gradient: torch.Tensor, record: StepRecord, lr: float
    ) -> None:
        """Update ``theta``, the weights of ``parameter`` in full precision, in place."""
        raise NotImplementedError

    def _exact(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weights themselves, or the float32 copy of half-precision ones."""
        if parameter.dtype not in HALF:
            return parameter
        return self._kept(parameter, "master", lambda: parameter.float())

    def _kept(self, parameter: torch.Tensor, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        state: dict[str, Any] = self.state[parameter]
        if name not in state:
            state[name] = make()
        found: torch.Tensor = state[name]
        return found

    def _moving(self) -> list[Any]:
        """The blocks that have a gradient."""
        return [block for block in self.blocks if block.parameter.grad is not None]


class Adam(FirstOrder):
    """Adam on all weights (arXiv 1412.6980); weight decay is decoupled (AdamW, arXiv 1711.05101).

    Published settings for OPT: batch 8, lr 1e-5 or 5e-5, linear decay; RoBERTa-large: lr 1e-5, 3e-5 or 5e-5.

    >>> weights = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = Adam([weights], lr=0.1)
    >>> def closure():
    ...     loss = weights.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> losses = [optimizer.step(closure) for _ in range(10)]
    >>> losses[-1] < losses[0] / 4
    True
    """

    def _rule(
        self, parameter: torch.Tensor, theta: torch.Tensor, gradient: torch.Tensor, record: StepRecord, lr: float
    ) -> None:
        first, second = (self._kept(parameter, name, lambda: torch.zeros_like(theta)) for name in ("first", "second"))
        adam_(theta, gradient, first, second, step=record.step + 1, lr=lr, eps=record.eps)


class SGD(FirstOrder):
    """``theta <- theta - lr * gradient``: plain SGD on all weights, without state."""

    def _rule(
        self, parameter: torch.Tensor, theta: torch.Tensor, gradient: torch.Tensor, record: StepRecord, lr: float
    ) -> None:
        theta.sub_(gradient, alpha=lr)
