"""SGD on the gradient of all weights: a first-order upper bound."""

import torch

from zoft.optim.core.first_order import FirstOrder
from zoft.optim.core.method import Method, Published
from zoft.optim.core.record import StepRecord


class SGD(FirstOrder):
    """``theta <- theta - lr * gradient``: plain SGD on all weights, without state."""

    def rule(
        self, parameter: torch.Tensor, theta: torch.Tensor, gradient: torch.Tensor, record: StepRecord, lr: float
    ) -> None:
        """Update ``theta``, the weights of ``parameter`` in full precision, in place."""
        theta.sub_(gradient, alpha=lr)


METHOD = Method(
    "sgd",
    "first-order bound: SGD, all weights",
    "arXiv 2305.17333",
    published={"full": Published(1e-3, 1e-8)},
    optimizer=SGD,
)
