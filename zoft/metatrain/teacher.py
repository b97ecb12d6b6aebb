"""The teacher: the first-order trajectory along whose points a tuner is trained."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from zoft.errors import ConfigError
from zoft.model.offload import zeros_placed_like
from zoft.optim.core.first_order import adam_
from zoft.quiet import quiet_bitsandbytes
from zoft.weights.blocks import Block

_PIECE = 2**20  # numbers per call of the library, which on a CPU holds 20 bytes for each during the call


class Teacher(Protocol):
    """Steps each block while its gradient exists: ``begin_step``, then ``step_block`` of those that have one."""

    def reset(self) -> None:
        """Reset the moments, as at the start of a trajectory; the caller restores the weights."""

    def begin_step(self) -> None:
        """Count a step."""

    def step_block(self, i: int) -> None:
        """Update block ``i`` by the gradient it has now."""


class AdamTeacher:
    """Adam (arXiv 1412.6980, algorithm 1) that steps each block while its gradient arrives in the backward pass.

    Beside the weights it holds the two moments and one block's gradient at a time: less than `torch.optim.Adam`,
    which needs all gradients at once. `begin_step`, then `step_block` for every block that has a gradient.

    Args:
        blocks: blocks with float32 (or float64) weights.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, blocks: Sequence[Block], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.blocks, self.lr, self.betas, self.eps = blocks, lr, betas, eps
        self.reset()

    def reset(self) -> None:
        """Reset the moments, as at the start of a trajectory; the caller restores the weights."""
        self.steps = 0
        self.moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin_step(self) -> None:
        """Count a step; the bias corrections depend on it."""
        self.steps += 1

    @torch.no_grad()
    def step_block(self, i: int) -> None:
        """Update block ``i`` by the gradient it has now."""
        parameter = self.blocks[i].parameter
        gradient = parameter.grad
        assert gradient is not None
        if i not in self.moments:
            self.moments[i] = (zeros_placed_like(parameter), zeros_placed_like(parameter))
        first, second = self.moments[i]
        adam_(parameter, gradient, first, second, step=self.steps, lr=self.lr, betas=self.betas, eps=self.eps)


class Adam8bitTeacher:
    """Adam with moments of one byte per number (arXiv 2110.02861), by the library bitsandbytes.

    Steps blocks as `AdamTeacher` does, in pieces; those of fewer than 4,096 numbers keep float32 moments. Made for
    GPUs: on a CPU the library takes many times as long as Adam in float32.

    Args:
        blocks: blocks with float32 weights.
        lr: learning rate.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """

    def __init__(self, blocks: Sequence[Block], *, lr: float) -> None:
        if find_spec("bitsandbytes") is None:
            raise ConfigError(
                "teacher adam8bit needs bitsandbytes, which is not installed; run: pip install 'zoft[lowbit]', or "
                "teacher=adam"
            )
        self.blocks, self.lr = blocks, lr
        self.reset()

    def reset(self) -> None:
        """Reset the moments, as at the start of a trajectory; the caller restores the weights."""
        self.optimizers: dict[int, Any] = {}

    def begin_step(self) -> None:
        """Each block's optimizer counts its own steps."""

    @torch.no_grad()
    def step_block(self, i: int) -> None:
        """Update block ``i`` by the gradient it has now."""
        parameter = self.blocks[i].parameter
        assert parameter.grad is not None
        if i not in self.optimizers:
            with quiet_bitsandbytes():
                from bitsandbytes.optim import Adam8bit  # seconds to import, for this option alone

            pieces = [torch.nn.Parameter(piece) for piece in parameter.detach().view(-1).split(_PIECE)]
            self.optimizers[i] = Adam8bit(pieces, lr=self.lr)
        (group,) = self.optimizers[i].param_groups
        for piece, gradient in zip(group["params"], parameter.grad.reshape(-1).split(_PIECE), strict=True):
            piece.grad = gradient
        self.optimizers[i].step()
        self.optimizers[i].zero_grad()


class SGDTeacher:
    """SGD with momentum, stepping each block while its gradient arrives, as the published code's teacher does.

    No gradient clipping: the norm over all blocks is known only after the first of them has been stepped.
    """

    def __init__(self, blocks: Sequence[Block], *, lr: float, momentum: float = 0.8) -> None:
        self.blocks, self.lr, self.momentum = blocks, lr, momentum
        self.reset()

    def reset(self) -> None:
        """Reset the momentum; the caller restores the weights."""
        self.velocity: dict[int, torch.Tensor] = {}

    def begin_step(self) -> None:
        """Nothing depends on the number of steps."""

    @torch.no_grad()
    def step_block(self, i: int) -> None:
        """Update block ``i`` by the gradient it has now."""
        parameter = self.blocks[i].parameter
        gradient = parameter.grad
        assert gradient is not None
        if i not in self.velocity:
            self.velocity[i] = zeros_placed_like(parameter)
        self.velocity[i].mul_(self.momentum).add_(gradient)
        parameter.sub_(self.velocity[i], alpha=self.lr)
