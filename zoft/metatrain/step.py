"""One point of meta-training: a zeroth-order step from the teacher's weights, its meta-gradient, a teacher step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from zoft.metatrain.gradient import (
    Products,
    control_variate,
    detached_slope,
    exact,
    lr_gradient,
    plain_lr_gradient,
    products,
    walk_,
)
from zoft.metatrain.teacher import Teacher
from zoft.noise.direction import NoiseDirection
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import full_sizes, normalise
from zoft.weights.blocks import Block, statistics
from zoft.weights.perturbed import PerturbedWeights

Estimator = Literal["control_variate", "exact", "detached"]
Closure = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class MetaPoint:
    """What was seen at one point.

    ``loss`` is at the teacher's weights, ``losses_after`` after the zeroth-order step of each probe, both on the
    batch of the meta-loss; ``scales`` are the ``s`` of all blocks, ``gradient`` is the estimate of the mean of
    ``dL(theta_1)/ds``, both ``(n,)``; ``lr_gradient`` is that of ``dL(theta_1)/d log lr``; ``unit`` is the length that
    ``gradient`` would have without curvature, which no chance enters.
    """

    loss: float
    losses_after: tuple[float, ...]
    slopes: tuple[float, ...]
    scales: torch.Tensor
    gradient: torch.Tensor
    lr_gradient: float
    unit: float

    @property
    def gain(self) -> float:
        """Mean fall of the loss in one zeroth-order step."""
        return self.loss - sum(self.losses_after) / len(self.losses_after)

    @property
    def finite(self) -> bool:
        """Whether everything that the tuner learns from is a number."""
        losses = (self.loss, *self.losses_after, *self.slopes, self.lr_gradient, self.unit)
        return all(map(math.isfinite, losses)) and bool(self.gradient.isfinite().all())


class MetaStepper:
    """Takes meta-training steps on a model; the tuner's gradients accumulate in its parameters.

    At a point ``theta_0`` of the trajectory, for each of ``probes`` probes: the two-point slope, a walk to
    ``theta_1 = theta_0 - lr slope u``, a backward pass there, a walk back. Then the teacher's own backward pass at
    ``theta_0`` gives the other half of the meta-gradient and moves the weights on. Two forwards a direction, and one
    forward and backward a direction and for the teacher; no gradient outlives the hook that takes it.

    Args:
        blocks: the model's blocks, in float32 or float64.
        tuner: the networks of these blocks, in the same order.
        teacher: steps the blocks.
        lr: learning rate of the zeroth-order step; it sets how much curvature the tuner feels. May be changed.
        eps: probe radius.
        probes: probes per point. (The step is even in ``z``: an antithetic partner would repeat it.)
        estimator: ``control_variate`` and ``exact`` have the same mean; ``detached`` takes the slope as constant.
        detach_normaliser: take the normaliser as a constant in the gradient, as the published code does.
        relative: divide each point's meta-gradient, which is of the order of ``lr``, by `MetaPoint.unit`. (Not by its
            own length: that would take the weight from the few directions along which the step is too long.)
        seed: of the noise.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        tuner: PertNN,
        teacher: Teacher,
        *,
        lr: float,
        eps: float = 1e-3,
        probes: int = 1,
        estimator: Estimator = "control_variate",
        detach_normaliser: bool = False,
        relative: bool = False,
        seed: int = 0,
    ) -> None:
        self.blocks, self.tuner, self.teacher = blocks, tuner, teacher
        self.lr, self.eps, self.probes, self.estimator = lr, eps, probes, estimator
        self.detach_normaliser, self.relative, self.seed = detach_normaliser, relative, seed
        self._sizes = None if tuner.effective_size == "none" else full_sizes(blocks)
        self._before: dict[str, Recurrent] = {}
        self.step_number = 0

    def reset(self) -> None:
        """Return the tuner's recurrent state and the teacher's moments to the start; the weights are the caller's."""
        self._before.clear()
        self.teacher.reset()

    def step(
        self,
        closure: Closure,
        task: str = "",
        sizes: torch.Tensor | None = None,
        fresh: Closure | None = None,
    ) -> MetaPoint:
        """Take one step on the batch whose differentiable loss ``closure`` returns, and say what was seen.

        Add the meta-gradient to the gradients of the tuner's parameters, move the weights by one teacher step, hand
        losses and scales on to the next step of the same ``task``. ``sizes`` are the effective sizes of the blocks,
        where they are not the numbers of weights. A point that is not `MetaPoint.finite` teaches nothing.

        Slope and teacher take the batch of ``closure``, the meta-loss that of ``fresh``, or the same if there is none.
        On the same batch what is peculiar to its examples counts as a gain; on a fresh one only what both have in
        common does, at the price of noise that no control variate takes away: it needs ``exact`` or ``detached``.
        """
        if fresh is not None and self.estimator == "control_variate":
            raise ValueError("the control variate knows no fresh batch: take the estimator exact or detached")
        before = self._before.get(task) or Recurrent.start(len(self.blocks))
        sigma = self.tuner(statistics(self.blocks), before)
        s = normalise(sigma, self._sizes if sizes is None else sizes, detach=self.detach_normaliser)
        scales = s.detach().float().double()
        noise = [NoiseDirection(self.seed, self.step_number, k) for k in range(self.probes)]
        slopes, losses_after, afters, pairs = [], [], [], []
        for k, z in enumerate(noise):
            u = self._direction(k, scales)
            pairs.append(self._probe(closure, u))
            slopes.append(self._slope(pairs[-1]))
            loss_after, after = self._after(fresh or closure, u, z, slopes[-1])
            losses_after.append(loss_after)
            afters.append(after)
        fresh_loss = None if fresh is None else self._value(fresh)
        self.teacher.begin_step()
        with products(self.blocks, noise, then=self.teacher.step_block) as start:
            loss = closure()
            loss.backward()
        point = MetaPoint(
            loss=float(loss.detach()) if fresh_loss is None else fresh_loss,
            losses_after=tuple(losses_after),
            slopes=tuple(slopes),
            scales=scales,
            gradient=self._gradient(slopes, start, afters, scales),
            lr_gradient=self._lr_gradient(slopes, None if fresh else start, afters, scales),
            unit=2 * self.lr * float((scales * start.squared_norms).norm()),
        )
        if point.finite:
            s.backward(point.gradient / point.unit if self.relative and point.unit else point.gradient)
            handed_on = scales if self.tuner.recurrent == "s" else sigma.detach().double()
            means = [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
            self._before[task] = Recurrent(means[0], means[1], handed_on)
        self.step_number += 1
        return point

    @torch.no_grad()
    def plain_losses_after(self, closure: Closure, fresh: Closure | None = None) -> tuple[float, ...]:
        """The losses after steps with sigma = 1 from the present weights, along the noise that `step` will use next.

        Three forwards a direction. The weights are walked there and back, the tuner is not asked. The batches are those
        of `step`.
        """
        losses = []
        for k in range(self.probes):
            z = NoiseDirection(self.seed, self.step_number, k)
            slope = self._slope(self._probe(closure, z))
            walk_(self.blocks, z, -self.lr * slope)
            try:
                losses.append(self._value(fresh or closure))
            finally:
                walk_(self.blocks, z, self.lr * slope)
        return tuple(losses)

    def _direction(self, probe: int, scales: torch.Tensor) -> NoiseDirection:
        named = dict(zip((block.name for block in self.blocks), scales.tolist(), strict=True))
        return NoiseDirection(self.seed, self.step_number, probe, named)

    @torch.no_grad()
    def _probe(self, closure: Closure, u: NoiseDirection) -> tuple[float, float]:
        losses = []
        for eps in (self.eps, -self.eps):
            with PerturbedWeights(self.blocks, u, eps):
                losses.append(self._value(closure))
        return losses[0], losses[1]

    @torch.no_grad()
    def _value(self, closure: Closure) -> float:
        return float(closure())

    def _slope(self, pair: tuple[float, float]) -> float:
        return (pair[0] - pair[1]) / (2 * self.eps)

    def _after(
        self, closure: Closure, u: NoiseDirection, z: NoiseDirection, slope: float
    ) -> tuple[float, torch.Tensor]:
        """The loss at ``theta_1`` and ``s1``; the weights are walked there and back."""
        if not math.isfinite(slope):  # the weights would not come back
            return math.nan, torch.full((len(self.blocks),), math.nan, dtype=torch.float64)
        walk_(self.blocks, u, -self.lr * slope)
        try:
            with products(self.blocks, [z]) as found:
                loss = closure()
                loss.backward()
        finally:
            walk_(self.blocks, u, self.lr * slope)
        return float(loss.detach()), found.with_noise[0]

    def _gradient(
        self, slopes: Sequence[float], start: Products, afters: Sequence[torch.Tensor], scales: torch.Tensor
    ) -> torch.Tensor:
        estimates = []
        for slope, s0, s1 in zip(slopes, start.with_noise, afters, strict=True):
            if self.estimator == "control_variate":
                estimates.append(control_variate(self.lr, s0, s1, start.squared_norms, scales))
            elif self.estimator == "exact":
                estimates.append(exact(self.lr, slope, s0, s1, scales))
            else:
                estimates.append(detached_slope(self.lr, slope, s1))
        return torch.stack(estimates).mean(0)

    def _lr_gradient(
        self, slopes: Sequence[float], start: Products | None, afters: Sequence[torch.Tensor], scales: torch.Tensor
    ) -> float:
        """The mean over directions; the plain form without a backward pass at ``theta_0`` on the same batch."""
        if start is None:
            pairs = zip(slopes, afters, strict=True)
            estimates = [plain_lr_gradient(self.lr, slope, s1, scales) for slope, s1 in pairs]
        else:
            both = zip(start.with_noise, afters, strict=True)
            estimates = [lr_gradient(self.lr, s0, s1, start.squared_norms, scales) for s0, s1 in both]
        return sum(estimates) / len(estimates)
