"""The parts of a zeroth-order step, timed in turn: bare forwards, zoft's step, its tuner, a naive step."""

import statistics
import time
import warnings
from collections.abc import Callable

import torch

from zoft.deploy.graphs import Ends, SentDirection, captured
from zoft.errors import ModelError
from zoft.memory import Buffers
from zoft.noise.direction import NoiseDirection
from zoft.optim import MeZO, ZOFineTuner, ZOOptimizer
from zoft.optim.methods.zo_finetuner import REFRESH
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import trainable_blocks
from zoft.weights.perturbed import SLICE, SLICE_ELSEWHERE

SETTINGS = {"lr": 1e-7, "eps": 1e-3}


def ratios(model: torch.nn.Module, *, batch: int, length: int, rounds: int, probes: int = 1) -> dict[str, float]:
    """Return what a step of ``probes`` directions takes over as many pairs of bare forwards, in all and by part.

    ``measure`` and ``update`` are the halves of a step; ``noise`` is the part of ``measure`` that perturbs, timed
    alone; ``tuner`` is what `ZOFineTuner` adds to `MeZO`, the reading of mean and variance included; ``naive`` is
    `naive_step`. On a GPU ``graphs`` is a step whose forwards are one captured graph (`zoft.deploy.graphs`), and
    ``graphs_bare`` the bare forwards captured, both over bare forwards that are not.
    Medians of ``rounds``, in which every part has its turn; the logits of every position are computed.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, model.config.vocab_size - 100, (batch, length), generator=generator).to(model.device)

    def closure() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    optimizer = MeZO(model, probes=probes, **SETTINGS)
    networks = PertNN([block.name for block in trainable_blocks(model)])
    tuned = ZOFineTuner(model, networks, probes=probes, **SETTINGS)
    records = [optimizer.measure(closure)]
    parts: dict[str, Callable[[], object]] = {
        "forward": closure,
        "measure": lambda: records.append(optimizer.measure(closure)),
        "update": lambda: optimizer.apply(records[-1]),
        "noise": lambda: _perturb_all(optimizer),
        "with_tuner": lambda: _measure_nothing(tuned),
        "without_tuner": lambda: _measure_nothing(optimizer),
        "naive": lambda: naive_step(list(model.parameters()), closure, seed=1, probes=probes, **SETTINGS),
    }
    if model.device.type == "cuda":
        parts |= _captured_parts(optimizer, closure)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, part in parts.items():
                seconds[name].append(_seconds(part, model.device))
    time_of = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    forwards = 2 * probes * time_of["forward"]
    graphs = {}
    if "graphs" in time_of:
        graphs["ratio_graphs"] = (time_of["graphs"] + time_of["update"]) / forwards
        graphs["ratio_graphs_bare"] = 2 * probes * time_of["graphs_bare"] / forwards
    return {
        "ratio": (time_of["measure"] + time_of["update"]) / forwards,
        "ratio_measure": time_of["measure"] / forwards,
        "ratio_noise": 2 * probes * time_of["noise"] / forwards,
        "ratio_update": time_of["update"] / forwards,
        "ratio_tuner": (time_of["with_tuner"] - time_of["without_tuner"]) / REFRESH / forwards,
        "ratio_naive": time_of["naive"] / forwards,
        **graphs,
        "forward_seconds": time_of["forward"],
    }


def _captured_parts(optimizer: ZOOptimizer, closure: Callable[[], torch.Tensor]) -> dict[str, Callable[[], object]]:
    """What is measured by replaying graphs; nothing where this model cannot be captured."""
    try:
        with torch.no_grad():
            bare = captured(closure, None)
            ends = Ends(closure, SentDirection(0, optimizer.table_dtype, optimizer.blocks))
            optimizer.measure(ends)
    except ModelError as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
    return {"graphs": lambda: optimizer.measure(ends), "graphs_bare": bare}


def _perturb_all(optimizer: ZOOptimizer) -> None:
    """Perturb every block once, slice by slice, as a forward pass that reads each of them once does."""
    direction = NoiseDirection(0, 0, table_dtype=optimizer.table_dtype)
    buffers = Buffers()
    for block in optimizer.blocks:
        parameter, width = block.parameter, block.shape[-1] if block.shape else 1
        step = max(1, SLICE.get(parameter.device.type, SLICE_ELSEWHERE) // width) * width
        for start in range(0, block.size, step):
            stop = min(block.size, start + step)
            out = buffers.take("slice", stop - start, parameter.dtype, parameter.device)
            direction.perturb(block, start, stop, SETTINGS["eps"], out)


def _measure_nothing(optimizer: ZOOptimizer) -> None:
    """Measure an objective that costs nothing, from one reading of mean and variance to the next."""
    for _ in range(REFRESH):
        optimizer.observe(optimizer.measure(lambda: 0.0))
        optimizer.step_number += 1


def naive_step(
    parameters: list[torch.nn.Parameter],
    closure: Callable[[], torch.Tensor],
    *,
    lr: float,
    eps: float,
    seed: int,
    probes: int = 1,
) -> None:
    """A MeZO step as in arXiv 2305.17333, algorithm 1: walk +eps, -2 eps, +eps, then update, z drawn anew each time."""

    def sweep(seed: int, scale: float) -> None:
        generator = torch.Generator(parameters[0].device).manual_seed(seed)
        for parameter in parameters:
            z = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            parameter.add_(z, alpha=scale)

    slopes = []
    for probe in range(seed, seed + probes):
        sweep(probe, eps)
        positive = closure().item()
        sweep(probe, -2 * eps)
        negative = closure().item()
        sweep(probe, eps)
        slopes.append((positive - negative) / (2 * eps))
    for probe, slope in zip(range(seed, seed + probes), slopes, strict=True):
        sweep(probe, -lr * slope / probes)


def _seconds(part: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
