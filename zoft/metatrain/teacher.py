"""The teacher: the first-order trajectory along whose points a tuner is trained."""

from collections.abc import Sequence
from typing import Protocol

import torch

from zoft.blocks import Block
from zoft.optim.first_order import adam_


class Teacher(Protocol):
    """Steps each block while its gradient is there: ``begin_step``, then ``step_block`` of those that have one."""

    def reset(self) -> None:
        """Forget the moments, as at the start of a trajectory; the weights are the caller's to restore."""

    def begin_step(self) -> None:
        """Count a step."""

    def step_block(self, i: int) -> None:
        """Update block ``i`` by the gradient it has now."""


class AdamTeacher:
    """Adam (arXiv 1412.6980, algorithm 1) that steps each block while its gradient arrives in the backward pass.

    Beside the weights it holds the two moments and, at any moment, one block's gradient: less than `torch.optim.Adam`,
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
        """Forget the moments, as at the start of a trajectory; the weights are the caller's to restore."""
        self.steps = 0
        self._moments: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin_step(self) -> None:
        """Count a step; the bias corrections depend on it."""
        self.steps += 1

    @torch.no_grad()
    def step_block(self, i: int) -> None:
        """Update block ``i`` by the gradient it has now."""
        parameter = self.blocks[i].parameter
        gradient = parameter.grad
        assert gradient is not None
        if i not in self._moments:
            self._moments[i] = (torch.zeros_like(parameter), torch.zeros_like(parameter))
        first, second = self._moments[i]
        adam_(parameter, gradient, first, second, step=self.steps, lr=self.lr, betas=self.betas, eps=self.eps)


class SGDTeacher:
    """SGD with momentum, stepping each block while its gradient arrives, as the published code's teacher does.

    No gradient clipping: the norm over all blocks is known only after the first of them has been stepped.
    """

    def __init__(self, blocks: Sequence[Block], *, lr: float, momentum: float = 0.8) -> None:
        self.blocks, self.lr, self.momentum = blocks, lr, momentum
        self.reset()

    def reset(self) -> None:
        """Forget the momentum; the weights are the caller's to restore."""
        self._velocity: dict[int, torch.Tensor] = {}

    def begin_step(self) -> None:
        """Nothing depends on the number of steps."""

    @torch.no_grad()
    def step_block(self, i: int) -> None:
        """Update block ``i`` by the gradient it has now."""
        parameter = self.blocks[i].parameter
        gradient = parameter.grad
        assert gradient is not None
        if i not in self._velocity:
            self._velocity[i] = torch.zeros_like(parameter)
        self._velocity[i].mul_(self.momentum).add_(gradient)
        parameter.sub_(self._velocity[i], alpha=self.lr)
