"""MeZO: zeroth-order SGD along isotropic directions (arXiv 2305.17333, algorithm 1; q probes: n-SPSA, definition 2)."""

from zoft.optim.core.method import Method, Published
from zoft.optim.core.optimizer import ZOOptimizer


class MeZO(ZOOptimizer):
    """``theta <- (1 - lr wd) theta - lr / q * sum_p slope_p z_p``: no state, two forward passes a probe.

    See `ZOOptimizer` for the arguments. Published settings: eps 1e-3, lr 1e-6 or 1e-7 for full fine-tuning of OPT; the
    best rate of a small model is higher (1.6e-5 to 3e-5 for SmolLM2-135M).

    >>> import torch
    >>> weights = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = MeZO([weights], lr=0.1, eps=1e-3)
    >>> losses = [optimizer.step(lambda: weights.square().sum()) for _ in range(50)]
    >>> losses[-1] < losses[0] / 2
    True
    """


METHOD = Method(
    "mezo",
    "zeroth-order SGD along isotropic directions",
    "arXiv 2305.17333",
    published={
        "full": Published(1e-6, 1e-3, grid=(1e-7, 1e-6)),  # OPT
        "lora": Published(1e-4, 1e-2, grid=(5e-5, 1e-4)),
        "prefix": Published(1e-2, 1e-1, grid=(1e-3, 1e-2)),
    },
    optimizer=MeZO,
)
