"""DiZO: the displacement of projected blocks from the base is rescaled now and then (arXiv 2502.03304, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from zoft.errors import ModelError
from zoft.optim.core.anchored import Anchored, length_of
from zoft.optim.core.method import Method, Published
from zoft.optim.core.oracle import Oracle
from zoft.optim.core.parts import Host, Projection
from zoft.optim.core.record import ProjectionRecord
from zoft.weights.blocks import Block

QUERY_AND_VALUE = "q_proj,v_proj,query,value,q_lin,v_lin,q,v"


@dataclass
class Search:
    """The search of one projection: everything in float64, one number a projected block."""

    anchored: Anchored
    norms: Any
    gamma: Any
    losses: list[float] = field(default_factory=list)
    m: Any = 0.0
    v: Any = 0.0

    def ratios(self, numbers: Any) -> Any:
        """Return ``numbers`` over the norms; a block that has not moved has no displacement to rescale."""
        return numbers / np.where(self.norms > 0, self.norms, 1.0)


class DiZO(Projection):
    """Every ``cycle`` steps, find for each projected block the length ``gamma`` that its displacement should have.

    With ``D = theta - theta_0``: ``gamma <- |D|`` (re-initialisation), then ``inner`` times, with a number ``zeta``
    from N(0, 1) for each block and ``L`` the loss at ``theta_0 + gamma / |D| D`` on the step's batch,

    ``p = (L(gamma + radius zeta) - L(gamma - radius zeta)) / (2 radius)``, ``gamma <- clip(gamma - rate p zeta)``

    into ``(1 - tau) |D| .. (1 + tau) |D|``; in the end ``theta <- theta_0 + gamma / |D| D``. Two forward passes an
    inner step. State: ``theta_0`` of the projected blocks, the only copy. With ``tau = 0`` it is MeZO bit for bit.

    >>> DiZO(cycle=100, tau=0.3).due(199)
    True
    """

    targets: str = Field(QUERY_AND_VALUE, description="names of the projected modules, joined by commas")
    cycle: int = Field(50, ge=1, description="steps between projections, kappa")
    inner: int = Field(10, ge=1, description="steps in which a projection is found, K")
    radius: float = Field(0.1, gt=0, description="of the probes of gamma, eps'")
    rate: float = Field(2.0, gt=0, description="learning rate of gamma, eta'")
    tau: float | None = Field(0.2, ge=0, description="how far gamma may go from |D|, as a share of it; null: anywhere")
    reinitialise: bool = Field(True, description="start from |D| in every cycle, else where gamma ended in the last")
    relative: bool = Field(
        False, description="as the published code: rate in units of |D|, and probes that stay within tau |D|"
    )
    project: Literal["weights", "lr"] = Field(
        "weights", description="lr: instead of the weights, multiply the rate of the steps up to the next projection"
    )
    anchor: Literal["base", "previous"] = Field(
        "base", description="previous: the displacement is that of the last step alone"
    )

    def check(self, host: Host) -> None:
        """Raise `ModelError` if there is nothing to project."""
        if not self.blocks_of(host.blocks):
            paths = [[part for part in block.name.split(".")[:-1] if not part.isdigit()] for block in host.blocks]
            modules = sorted({path[-1] for path in paths if path})
            raise ModelError(
                f"dizo projects the weights of {self.targets}, and the model has none of these; it has "
                f"{', '.join(modules) or 'no modules'}: name some by --set options.targets=NAME,NAME"
            )

    def blocks_of(self, blocks: Sequence[Block]) -> list[Block]:
        """Return the projected blocks: weights of two dimensions or more of the targets."""
        names = {name.strip() for name in self.targets.split(",")}
        return [block for block in blocks if len(block.shape) > 1 and names & set(block.name.split(".")[:-1])]

    def due(self, step: int) -> bool:
        """Whether a projection follows ``step``: it ends a cycle."""
        return (step + 1) % self.cycle == 0

    def forwards(self, steps: int) -> float:
        """Return two for every inner step."""
        return steps // self.cycle * 2 * self.inner

    def before(self, host: Host, step: int) -> None:
        """Keep the weights before the step, where they are the anchor."""
        if self._last_step_alone:
            self._keep(host, anew=True)

    def start(self, host: Host) -> None:
        """Keep the weights of the base."""
        if not self._last_step_alone:
            self._keep(host, anew=False)

    @property
    def _last_step_alone(self) -> bool:
        return self.anchor == "previous" or self.project == "lr"

    def _keep(self, host: Host, *, anew: bool) -> None:
        for block in self.blocks_of(host.blocks):
            state = host.state_of(block)
            if anew or "anchor" not in state:
                state["anchor"] = block.parameter.detach().clone()

    def anchored(self, host: Host) -> Anchored:
        """Return the projected blocks with their anchors."""
        blocks = self.blocks_of(host.blocks)
        return Anchored(blocks, [host.state_of(block)["anchor"] for block in blocks])

    def measure(self, host: Host, oracle: Oracle, step: int) -> ProjectionRecord:
        """Find gamma; nothing is projected where a loss is not finite."""
        anchored = self.anchored(host)
        norms = np.array([length_of(block, anchor) for block, anchor in anchored.pairs])
        search = Search(anchored, norms, gamma=norms)
        if not self.reinitialise and "gamma" in host.memory:
            search.gamma = self._clipped(np.array(host.memory["gamma"]), norms)
        seed = host.seed
        for inner in range(self.inner):
            generator = np.random.Generator(np.random.Philox(key=[seed, 2 + step * self.inner + inner]))
            search.gamma = self._clipped(self.better(oracle, search, generator), norms)
        ratios = np.where(norms > 0, search.ratios(search.gamma), 1.0)
        finite = np.isfinite(search.losses).all() and np.isfinite(ratios).all()
        found = tuple(ratios.tolist()) if finite else ()
        return ProjectionRecord(step, found, tuple(norms.tolist()), tuple(search.losses), oracle.forwards)

    def _clipped(self, gamma: Any, norms: Any) -> Any:
        return gamma if self.tau is None else np.clip(gamma, (1 - self.tau) * norms, (1 + self.tau) * norms)

    def better(self, oracle: Oracle, search: Search, generator: np.random.Generator) -> Any:
        """Return gamma after one inner step, in float64; the losses measured on the way go into ``search``."""
        zeta = generator.standard_normal(len(search.norms))
        if self.relative and self.tau is not None:
            limit = self.tau / self.radius * search.norms
            zeta = np.clip(zeta, -limit, limit)
        pos, neg = (
            oracle(search.anchored.at(search.ratios(search.gamma + side * self.radius * zeta))) for side in (1, -1)
        )
        search.losses += [pos, neg]
        return search.gamma - self.rate_at(search) * ((pos - neg) / (2 * self.radius)) * zeta

    def rate_at(self, search: Search) -> Any:
        """Return the learning rate of gamma: in units of the displacements where it is relative."""
        return self.rate * search.norms if self.relative else self.rate

    def apply(self, host: Host, record: ProjectionRecord) -> None:
        """Give the displacements the lengths found: ``theta <- theta + (ratio - 1) D``, in float32, rounded once."""
        if self.project == "lr":
            return
        seed = host.seed
        for (block, anchor), ratio in zip(self.anchored(host).pairs, record.ratios, strict=True):
            if ratio == 1:
                continue
            flat = anchor.view(-1)

            def rescale(theta: torch.Tensor, lo: int, hi: int, flat: torch.Tensor = flat, by: float = ratio) -> None:
                theta.add_((theta - flat[lo:hi].to(theta.dtype)) * (by - 1))

            host.sweep(block, f"{seed}/{record.step}/projection/{block.name}", seed, rescale)

    def remember(self, host: Host, record: ProjectionRecord) -> None:
        """Take over gamma, and the ratios where they are rates."""
        pairs = zip(record.ratios, record.norms, strict=True)
        host.memory["gamma"] = [ratio * norm for ratio, norm in pairs]
        if self.project == "lr":
            names = [block.name for block in self.blocks_of(host.blocks)]
            host.memory["rates"] = dict(zip(names, record.ratios, strict=True))

    def rate_of(self, host: Host, block: Block) -> float:
        """Return what multiplies the learning rate of ``block``: 1, but where the rate is what is projected."""
        rates: dict[str, float] = host.memory.get("rates", {})
        return rates.get(block.name, 1.0)


METHOD = Method(
    "dizo",
    "MeZO, the displacement of query and value rescaled every 50 steps",
    "arXiv 2502.03304",
    parts=(DiZO,),
    published={"full": Published(grid=(5e-7, 1e-6))},
)
