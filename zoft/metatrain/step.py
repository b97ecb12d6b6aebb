"""One point of meta-training: a zeroth-order step from the teacher's weights, its meta-gradient, a teacher step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zoft.metatrain.gradient import (
    Closure,
    Estimator,
    mean_gradient,
    mean_lr_gradient,
    products,
    two_point_slope,
    walk_,
)
from zoft.metatrain.teacher import Teacher
from zoft.noise.direction import NoiseDirection
from zoft.tuner.features import Recurrent
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import full_sizes, normalise
from zoft.weights.blocks import Block, statistics
from zoft.weights.perturbed import PerturbedWeights


@dataclass(frozen=True)
class MetaPoint:
    """Measurements at one point.

    ``loss`` is at the teacher's weights, ``losses_after`` after the zeroth-order step of each probe, both on the
    batch of the meta-loss; ``scales`` are the ``s`` of all blocks, ``gradient`` is the estimate of the mean of
    ``dL(theta_1)/ds``, both ``(n,)``; ``lr_gradient`` is that of ``dL(theta_1)/d log lr``; ``unit`` is the length that
    ``gradient`` would have without curvature, and is not random.
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
    ``theta_0`` gives the other half of the meta-gradient and moves the weights on. Two forwards a probe, and one
    forward and backward a probe and for the teacher; no gradient outlives the hook that takes it.

    Args:
        blocks: the model's blocks, in float32 or float64.
        tuner: the networks of these blocks, in the same order.
        teacher: steps the blocks.
        lr: learning rate of the zeroth-order step, which decides how much curvature matters. May be changed.
        eps: probe radius.
        probes: probes per point. (The step is even in ``z``: an antithetic partner would repeat it.)
        estimator: ``control_variate`` and ``exact`` have the same mean; ``detached`` takes the slope as constant.
        detach_normaliser: take the normaliser as a constant in the gradient, as the published code does.
        relative: divide each point's meta-gradient, which is of the order of ``lr``, by `MetaPoint.unit`. (Not by its
            own length: that would remove the weight of the few directions along which the step is too long.)
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
        """Take one step on the batch whose differentiable loss ``closure`` returns, and return the measurements.

        Add the meta-gradient to the gradients of the tuner's parameters, move the weights by one teacher step, and keep
        losses and scales for the next step of the same ``task``. ``sizes`` are the effective sizes of the blocks, by
        default their numbers of weights. At a point that is not `MetaPoint.finite` the tuner gets no gradient.

        Slope and teacher use the batch of ``closure``, the meta-loss that of ``fresh``, or the same if that is None. On
        the same batch, fitting these very examples is a gain; on a fresh one only what both have in common is, at the
        price of noise that no control variate removes: it needs ``exact`` or ``detached``.
        """
        if fresh is not None and self.estimator == "control_variate":
            raise ValueError(
                "the control variate needs the same batch: with a fresh one use the estimator exact or detached"
            )
        before = self._before.get(task) or Recurrent.start(len(self.blocks))
        sigma = self.tuner(statistics(self.blocks), before)
        s = normalise(sigma, self._sizes if sizes is None else sizes, detach=self.detach_normaliser)
        scales = s.detach().float().double()
        noise = [NoiseDirection(self.seed, self.step_number, k) for k in range(self.probes)]
        slopes, losses_after, afters, pairs = [], [], [], []
        for k, z in enumerate(noise):
            u = self._direction(k, scales)
            pairs.append(self._probe(closure, u))
            slopes.append(two_point_slope(pairs[-1], self.eps))
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
            gradient=mean_gradient(self.estimator, self.lr, slopes, start, afters, scales),
            lr_gradient=mean_lr_gradient(self.lr, slopes, None if fresh else start, afters, scales),
            unit=2 * self.lr * float((scales * start.squared_norms).norm()),
        )
        if point.finite:
            s.backward(point.gradient / point.unit if self.relative and point.unit else point.gradient)
            passed_on = scales if self.tuner.recurrent == "s" else sigma.detach().double()
            means = [sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1)]
            self._before[task] = Recurrent(means[0], means[1], passed_on)
        self.step_number += 1
        return point

    @torch.no_grad()
    def plain_losses_after(self, closure: Closure, fresh: Closure | None = None) -> tuple[float, ...]:
        """Return the losses after steps with sigma = 1 from the present weights, along the noise that `step` uses next.

        Three forwards a probe. The weights are walked there and back; the tuner is not used. The batches are those of
        `step`.
        """
        losses = []
        for k in range(self.probes):
            z = NoiseDirection(self.seed, self.step_number, k)
            slope = two_point_slope(self._probe(closure, z), self.eps)
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
