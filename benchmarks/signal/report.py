"""The tables: shares of every kind, the bound, and what the scales of one point gain at another."""

import re
from collections.abc import Callable, Mapping

import torch

from benchmarks.signal.bound import Groups, best_rate, best_single, gain
from benchmarks.signal.measure import Signal
from zoft.metatrain.controls import energy_scales
from zoft.tuner.networks import group_of

THIRDS = 3  # of the depth


def report(points: Mapping[str, Signal], batch_size: int) -> str:
    """Return all tables as Markdown."""
    if not points:
        return "nothing measured"
    kinds = {label: grouped(point, kind_of) for label, point in points.items()}
    tables = [_kinds(label, point, kinds[label], batch_size) for label, point in points.items()]
    return "\n\n".join([*tables, _gains(points, kinds, batch_size), _transfer(kinds, batch_size)])


def grouped(point: Signal, group: Callable[[str, int], str]) -> Groups:
    """Sum the blocks of each group; ``group`` is called with a block's name and the number of layers."""
    layers = 1 + max((layer_of(name) for name in point.names if layer_of(name) is not None), default=0)
    of_block = [group(name, layers) for name in point.names]
    names = list(dict.fromkeys(of_block))
    index = torch.tensor([names.index(name) for name in of_block])

    def total(values: list[float] | list[int]) -> torch.Tensor:
        return torch.zeros(len(names), dtype=torch.float64).index_add(0, index, torch.tensor(values).double())

    return Groups(names, total(point.sizes), total(point.signal), total(point.noise), total(point.fisher))


def kind_of(name: str, layers: int) -> str:
    """The kind of a block, as tuners pool it."""
    return group_of(name, "kind")


def third_of(name: str, layers: int) -> str:
    """The kind of a block and the third of the depth that it is in.

    >>> third_of("model.layers.29.mlp.up_proj.weight", 30)
    'model.layers.*.mlp.up_proj.weight 3/3'
    """
    layer = layer_of(name)
    return kind_of(name, layers) + ("" if layer is None else f" {layer * THIRDS // layers + 1}/{THIRDS}")


def layer_of(name: str) -> int | None:
    """The number of the layer that a block is in; None outside of them."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _kinds(label: str, point: Signal, groups: Groups, batch_size: int) -> str:
    parts = torch.tensor(point.signal_parts, dtype=torch.float64)
    index = torch.tensor([groups.names.index(kind_of(name, 0)) for name in point.names])
    spread = torch.zeros(len(parts), len(groups.names), dtype=torch.float64).index_add(1, index, parts).std(0)
    curvature = torch.tensor(point.curvature, dtype=torch.float64)
    lines = [
        f"{label}: loss {point.loss:.3f}, signal {groups.signal.sum():.1f}, noise of an example "
        f"{groups.noise.sum():.0f}, Fisher trace {groups.fisher.sum():.0f}, "
        f"curvature along noise {curvature.mean():.0f} ± {curvature.std() / len(curvature) ** 0.5:.0f}",
        "",
        "| kind | weights | signal | noise | Fisher | signal / Fisher | batch / Fisher |",
        "|---|---|---|---|---|---|---|",
    ]
    for k, name in enumerate(groups.names):
        signal = groups.signal.sum()
        lines.append(
            f"| {_short(name)} | {groups.sizes[k] / groups.sizes.sum():.4f} | {groups.signal[k] / signal:.3f} ± "
            f"{spread[k] / len(parts) ** 0.5 / signal:.3f} | {groups.noise[k] / groups.noise.sum():.3f} | "
            f"{groups.fisher[k] / groups.fisher.sum():.3f} | {groups.ratio[k]:.2f} | "
            f"{groups.batch_ratio(batch_size)[k]:.2f} |"
        )
    return "\n".join(lines)


def _gains(points: Mapping[str, Signal], kinds: Mapping[str, Groups], batch_size: int) -> str:
    """The gain of a step over MeZO's with several scales, and the bounds."""
    lines = [
        "| point | MeZO's best rate | bound by kind | bound by kind and third of the depth | scales from energy | "
        "ratio of the kind | ratio ^ 2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, point in points.items():
        groups = kinds[label]
        blocks = grouped(point, lambda name, layers: name)
        energy = blocks.of_batch(batch_size) / blocks.sizes
        of_energy = energy_scales(energy, blocks.sizes).square()
        bounds = [best_single(one, batch_size) for one in (groups, grouped(point, third_of))]
        lines.append(
            f"| {label} | {best_rate(groups, batch_size):.1e} | "
            + " | ".join(f"{value:.2f} ({_short(name)})" for name, value in bounds)
            + f" | {gain(blocks, of_energy, batch_size):.2f}"
            + "".join(f" | {gain(groups, groups.ratio.clamp(min=0) ** power, batch_size):.2f}" for power in (1, 2))
            + " |"
        )
    return "\n".join(lines)


def _transfer(kinds: Mapping[str, Groups], batch_size: int) -> str:
    """The gain at each point (column) with the squared scales ``ratio ^ 2`` of another (row)."""
    lines = ["| scales of | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for label, source in kinds.items():
        weight = source.ratio.clamp(min=0) ** 2
        gains = [f"{gain(target, weight, batch_size):.2f}" for target in kinds.values()]
        lines.append(f"| {label} | " + " | ".join(gains) + " |")
    return "\n".join(lines)


def _short(name: str) -> str:
    """A kind without the part that all names share.

    >>> _short("model.layers.*.self_attn.v_proj.weight 2/3")
    'v_proj 2/3'
    """
    return re.sub(r"^model\.|layers\.\*\.|self_attn\.|mlp\.|\.weight", "", name)
