"""First-order training of all weights: the upper bounds that zeroth-order methods are measured against.

A step takes one forward and one backward pass (counted as two forwards more), all gradients at once and, for Adam, two
moments of every weight. A record holds no gradient, so a run is resumed by taking the steps since a snapshot again, and
cannot be replayed.
"""

import math
from collections.abc import Callable

import torch

from zoft.errors import ConfigError, RunError
from zoft.optim.core.base import RecordOptimizer
from zoft.optim.core.groups import Parameters
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


class FirstOrder(RecordOptimizer):
    """A step from the gradient of all blocks; a subclass gives the rule.

    ``closure`` follows the habit of `torch.optim`: it computes the loss, calls ``backward`` and returns the loss.
    Half-precision weights are updated in a float32 copy (optimizer state), as mixed-precision training does.

    Args:
        params, lr, weight_decay, seed, journal: as for `ZOOptimizer`.
        eps: Adam's, added to the root of the second moment; SGD ignores it.
        probes: 1; there is nothing to probe.
        master_weights: ignored, half-precision weights always have their float32 copy.
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
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": seed}, journal)

    def measure(self, closure: Closure) -> StepRecord:
        """Evaluate ``closure``, which leaves the gradients with the parameters; the record has the gradient's norm."""
        self.zero_grad()
        with torch.enable_grad():
            loss = float(torch.as_tensor(closure()).detach())
        squares = read([gradient.double().square().sum() for gradient in self._gradients()])
        return StepRecord(
            step=self.step_number,
            seed=self.seed,
            lr=self.learning_rates,
            eps=self.eps,
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
        if not isinstance(record, StepRecord):
            raise ConfigError(f"a projection of step {record.step} was given to a first-order method, which has none")
        self._check_step(record)
        if not record.skipped:
            if not self._gradients():
                raise RunError(f"step {record.step} is first-order, and its gradient is gone: measure it again")
            self._update(record)
        self.zero_grad()
        self.step_number = record.step + 1

    def _update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                theta = self._exact(parameter)
                if group["weight_decay"] and parameter.ndim > 1:
                    theta.mul_(1 - lr * group["weight_decay"])
                self.rule(parameter, theta, parameter.grad.to(theta.dtype), record, lr)
                parameter.copy_(theta)

    def rule(
        self, parameter: torch.Tensor, theta: torch.Tensor, gradient: torch.Tensor, record: StepRecord, lr: float
    ) -> None:
        """Update ``theta``, the weights of ``parameter`` in full precision, in place."""
        raise NotImplementedError

    def kept(self, parameter: torch.Tensor, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the state tensor ``name`` of ``parameter``, made by ``make`` where there is none yet."""
        state = self.state[parameter]
        if name not in state:
            state[name] = make()
        found: torch.Tensor = state[name]
        return found

    def _exact(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weights themselves, or the float32 copy of half-precision ones."""
        if parameter.dtype not in HALF:
            return parameter
        return self.kept(parameter, "master", lambda: parameter.float())

    def _gradients(self) -> list[torch.Tensor]:
        parameters = [block.parameter for block in self.blocks]
        return [parameter.grad for parameter in parameters if parameter.grad is not None]
