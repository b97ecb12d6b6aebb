"""One point of meta-training: a zeroth-order step from the teacher's weights, its meta-gradient, a teacher step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from zoft.blocks import Block, statistics
from zoft.metatrain.gradient import control_variate, detached_slope, exact, products, walk_
from zoft.metatrain.teacher import AdamTeacher
from zoft.noise import Direction
from zoft.pertnn import PertNN, Recurrent, normalise
from zoft.perturb import PerturbedWeights

Estimator = Literal["control_variate", "exact", "detached"]


@dataclass(frozen=True)
class MetaPoint:
    """What was seen at one point.

    ``loss`` is at the teacher's weights, ``losses_after`` after the zeroth-order step along each direction, ``scales``
    are the ``s`` of all blocks, ``gradient`` is the estimate of the mean of ``dL(theta_1)/ds``, both ``(n,)``.
    """

    loss: float
    losses_after: tuple[float, ...]
    slopes: tuple[float, ...]
    scales: torch.Tensor
    gradient: torch.Tensor

    @property
    def gain(self) -> float:
        """Mean fall of the loss in one zeroth-order step."""
        return self.loss - sum(self.losses_after) / len(self.losses_after)


class MetaStepper:
    """Takes meta-training steps on a model; the tuner's gradients accumulate in its parameters.

    At a point ``theta_0`` of the trajectory, for each of ``directions`` probes: the two-point slope, a walk to
    ``theta_1 = theta_0 - lr slope u``, a backward pass there, a walk back. Then the teacher's own backward pass at
    ``theta_0`` gives the other half of the meta-gradient and moves the weights on. Two forwards a direction, and one
    forward and backward a direction and for the teacher; no gradient outlives the hook that takes it.

    Args:
        blocks: the model's blocks, in float32 or float64.
        tuner: the networks of these blocks, in the same order.
        teacher: steps the blocks.
        lr: learning rate of the zeroth-order step; it sets how much curvature the tuner feels.
        eps: probe radius.
        directions: probes per point.
        estimator: ``control_variate`` and ``exact`` have the same mean; ``detached`` takes the slope as constant.
        detach_normaliser: take the normaliser as a constant in the gradient, as the published code does.
        seed: of the noise.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        tuner: PertNN,
        teacher: AdamTeacher,
        *,
        lr: float,
        eps: float = 1e-3,
        directions: int = 1,
        estimator: Estimator = "control_variate",
        detach_normaliser: bool = False,
        seed: int = 0,
    ) -> None:
        self.blocks, self.tuner, self.teacher = blocks, tuner, teacher
        self.lr, self.eps, self.directions, self.estimator = lr, eps, directions, estimator
        self.detach_normaliser, self.seed = detach_normaliser, seed
        self._sizes = torch.tensor([block.size for block in blocks], dtype=torch.float64)
        self.before = Recurrent.start(len(blocks))
        self.step_number = 0

    def reset(self) -> None:
        """Return the tuner's recurrent state and the teacher's moments to the start; the weights are the caller's."""
        self.before = Recurrent.start(len(self.blocks))
        self.teacher.reset()

    def step(self, closure: Callable[[], torch.Tensor]) -> MetaPoint:
        """Take one step on the batch whose differentiable loss ``closure`` returns, and say what was seen.

        Add the meta-gradient to the gradients of the tuner's parameters, move the weights by one teacher step, hand
        losses and scales on to the next step.
        """
        sigma = self.tuner(statistics(self.blocks), self.before)
        s = normalise(sigma, self._sizes, detach=self.detach_normaliser)
        scales = s.detach().float().double()
        named = dict(zip((block.name for block in self.blocks), scales.tolist(), strict=True))
        noise = [Direction(self.seed, self.step_number, k) for k in range(self.directions)]
        probes = [Direction(self.seed, self.step_number, k, named) for k in range(self.directions)]
        pairs, afters, losses_after = [], [], []
        for u, z in zip(probes, noise, strict=True):
            pairs.append(self._probe(closure, u))
            loss_after, after = self._after(closure, u, z, self._slope(pairs[-1]))
            losses_after.append(loss_after)
            afters.append(after)
        self.teacher.begin_step()
        with products(self.blocks, noise, then=self.teacher.step_block) as start:
            loss = closure()
            loss.backward()
        slopes = [self._slope(pair) for pair in pairs]
        estimates = [
            self._estimate(slope, s0, s1, start.squared_norms, scales)
            for slope, s0, s1 in zip(slopes, start.with_noise, afters, strict=True)
        ]
        gradient = torch.stack(estimates).mean(0)
        s.backward(gradient)
        count = len(pairs)
        handed_on = scales if self.tuner.activation == "exp" else sigma.detach().double()
        self.before = Recurrent(sum(p for p, _ in pairs) / count, sum(n for _, n in pairs) / count, handed_on)
        self.step_number += 1
        return MetaPoint(float(loss.detach()), tuple(losses_after), tuple(slopes), scales, gradient)

    @torch.no_grad()
    def _probe(self, closure: Callable[[], torch.Tensor], u: Direction) -> tuple[float, float]:
        losses = []
        for eps in (self.eps, -self.eps):
            with PerturbedWeights(self.blocks, u, eps):
                losses.append(float(closure()))
        return losses[0], losses[1]

    def _slope(self, pair: tuple[float, float]) -> float:
        return (pair[0] - pair[1]) / (2 * self.eps)

    def _after(
        self, closure: Callable[[], torch.Tensor], u: Direction, z: Direction, slope: float
    ) -> tuple[float, torch.Tensor]:
        """The loss at ``theta_1`` and ``s1``; the weights are walked there and back."""
        walk_(self.blocks, u, -self.lr * slope)
        try:
            with products(self.blocks, [z]) as found:
                loss = closure()
                loss.backward()
        finally:
            walk_(self.blocks, u, self.lr * slope)
        return float(loss.detach()), found.with_noise[0]

    def _estimate(
        self, slope: float, s0: torch.Tensor, s1: torch.Tensor, squared_norms: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        if self.estimator == "control_variate":
            return control_variate(self.lr, s0, s1, squared_norms, scales)
        if self.estimator == "exact":
            return exact(self.lr, slope, s0, s1, scales)
        return detached_slope(self.lr, slope, s1)
