"""Adam on the gradient of all weights: a first-order upper bound (arXiv 1412.6980)."""

import torch

from zoft.optim.core.first_order import FirstOrder, adam_
from zoft.optim.core.method import Method, Published
from zoft.optim.core.record import StepRecord


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

    def rule(
        self, parameter: torch.Tensor, theta: torch.Tensor, gradient: torch.Tensor, record: StepRecord, lr: float
    ) -> None:
        """Update ``theta``, the weights of ``parameter`` in full precision, in place."""
        first, second = (self.kept(parameter, name, lambda: torch.zeros_like(theta)) for name in ("first", "second"))
        adam_(theta, gradient, first, second, step=record.step + 1, lr=lr, eps=record.eps)


METHOD = Method(
    "adam",
    "first-order bound: Adam, all weights",
    "arXiv 1412.6980",
    published={  # arXiv 2305.17333, first-order rows
        "full": Published(1e-5, 1e-8, grid=(1e-5, 5e-5)),
        "lora": Published(1e-4, 1e-8),
        "prefix": Published(1e-2, 1e-8),
    },
    optimizer=Adam,
)
