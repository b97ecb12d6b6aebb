"""Stochastic rounding and its dither against their closed forms."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoft.noise.rounding import DITHER_SIZE, Dither, dither_table, round_stochastically
from zoft.noise.table import chunk_length
from zoft.weights.blocks import Block

HALVES = (torch.bfloat16, torch.float16)


@given(st.floats(-60000, 60000, width=32), st.sampled_from(HALVES))
def test_rounding_takes_a_neighbour_and_keeps_the_mean(value: float, dtype: torch.dtype) -> None:
    x = torch.full((2**16,), value)
    rounded = round_stochastically(x.clone(), torch.arange(2**16, dtype=torch.int32), dtype).double()
    nearest = torch.tensor(value).to(dtype).double().item()
    ulp = max(abs(nearest) * torch.finfo(dtype).eps, 2.0**-24 if dtype == torch.float16 else 2.0**-133)
    assert len(rounded.unique()) <= 2
    assert (rounded - value).abs().max() <= ulp
    assert abs(rounded.mean().item() - value) <= ulp / 2**12


@given(st.floats(-60000, 60000, width=16), st.sampled_from(HALVES))
def test_a_representable_number_stays_itself(value: float, dtype: torch.dtype) -> None:
    exact = torch.tensor(value).to(dtype)
    rounded = round_stochastically(exact.float().expand(2**16).clone(), torch.arange(2**16, dtype=torch.int32), dtype)
    assert (rounded == exact).all()


def test_an_update_below_half_a_step_survives_in_the_mean() -> None:
    """1,000 updates of 1e-6 on weights of 0.5, whose bf16 step is 3.9e-3: rounding to nearest would lose them all."""
    weights = torch.full((2**16,), 0.5, dtype=torch.bfloat16)
    table = dither_table(0, torch.device("cpu"))
    for step in range(1000):
        weights = round_stochastically(weights.float() + 1e-6, table[step * 7 : step * 7 + 2**16], torch.bfloat16)
    assert weights.float().mean().item() == pytest.approx(0.501, abs=1e-4)


def test_dither_is_what_journals_were_written_with() -> None:
    drawn = np.random.Generator(np.random.Philox(key=[3, 1])).integers(0, 2**16, DITHER_SIZE, dtype=np.int32)
    assert (dither_table(3, torch.device("cpu")).numpy() == drawn).all()


def test_dither_is_uniform() -> None:
    counts = torch.bincount(dither_table(4, torch.device("cpu")) >> 8, minlength=256).double()
    chi_squared = ((counts - DITHER_SIZE / 256) ** 2 / (DITHER_SIZE / 256)).sum()
    assert 180 < chi_squared < 340  # 255 degrees of freedom: mean 255, standard deviation 23


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(5,), (3, 70_000), (1100, 500), (200_000, 1), (65_537,)])
def test_dither_follows_the_specification(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A twin in Python's integers, at a hundred places: place, stride and rounding."""
    block = Block("w", torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    flat, length, table = block.parameter.detach().view(-1), chunk_length(block), dither_table(2, torch.device("cpu"))
    rounded = torch.empty_like(flat, dtype=dtype)
    for lo in range(0, block.size, length):
        Dither(block, "key", 2).round_(flat[lo : lo + length].clone(), lo, rounded[lo : lo + length])
    width = min(shape[-1], 2**16)
    rows = min(-(-block.size // width), length // width)
    digest = hashlib.shake_128(b"key").digest(8 * -(-block.size // length))
    for i in np.random.default_rng(0).integers(0, block.size, 100).tolist():
        chunk, within = divmod(i, length)
        first, second = (int.from_bytes(digest[at : at + 4], "little") for at in (8 * chunk, 8 * chunk + 4))
        stride = 1 + second % max(1, (2**17 - width) // rows)
        place = first % 2**31 % (2**18 + 1 - (rows - 1) * stride - width) + within // width * stride + within % width
        expected = round_stochastically(flat[i : i + 1].clone(), table[place : place + 1], dtype)
        assert rounded[i] == expected


def test_dither_differs_between_weights_and_updates() -> None:
    block = Block("w", torch.nn.Parameter(torch.full((400, 300), 1 + 2.0**-9)))
    flat, up = block.parameter.detach().view(-1), []
    for update in range(64):
        out = torch.empty_like(flat, dtype=torch.bfloat16)
        Dither(block, f"{update}", 0).round_(flat.clone(), 0, out)
        up.append((out > 1).double())
    share = torch.stack(up)
    assert abs(share.mean() - 0.25) < 0.01
    assert ((share.mean(1) - 0.25).abs() < 0.01).all()  # of the weights in one update
    assert share.mean(0).std() == pytest.approx((0.25 * 0.75 / 64) ** 0.5, rel=0.1)  # of the updates of one weight
