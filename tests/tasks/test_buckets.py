"""Batches filled up to a bucket: the same loss, few shapes, and tensors of one shape that take another's numbers."""

import random

import pytest
import torch

from tests.conftest import FAMILIES
from tests.tasks.conftest import make_task
from tests.tasks.test_losses import EXAMPLES
from tests.tasks.test_packing import FAR, made
from zoft.memory import flatten, unflatten
from zoft.tasks import loss
from zoft.tasks.batches import host_batch
from zoft.tasks.buckets import bucket, padded, shape_of
from zoft.tasks.types import Example

KINDS = ["classification", "choice", "text"]


def test_a_bucket_holds_its_sizes_and_a_quarter_more_at_most() -> None:
    for step in (1, 8):
        for size in range(1, 3000):
            assert size <= bucket(size, step) <= max(size * 1.25, size + step - 1)
            assert bucket(bucket(size, step), step) == bucket(size, step) and bucket(size, step) % step == 0
    assert len({bucket(size) for size in range(1, 3000)}) < 45


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_leaves_the_loss(family: str, kind: str, encode) -> None:
    model, task = made(family), make_task(kind)
    encoded = encode(task, EXAMPLES if kind != "text" else [Example("", (one.full_text(0),)) for one in EXAMPLES])
    for count in range(1, len(encoded) + 1):
        batch = host_batch(encoded[:count], 0, packable=FAR)
        full = padded(batch, 7)
        assert all(array.size >= batch.arrays[name].size for name, array in full.arrays.items())
        assert len(full.arrays["counts"]) > len(batch.arrays["counts"])
        expected, found = (loss(model, task, one.to("cpu")) for one in (batch, full))
        assert found.weight == expected.weight
        torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tensors_of_a_shape_take_the_numbers_of_every_batch_of_it(encode) -> None:
    model, task, draw = made("llama"), make_task("classification"), random.Random(0)
    words = ["film", "cast", "plot", "ending", "toy", "was", "great"]
    rows = [
        Example(" ".join(draw.choices(words, k=draw.randint(3, 9))) + ". It was", (" great", " terrible"), i % 2)
        for i in range(64)
    ]
    encoded = encode(task, rows)
    kept: dict[tuple[object, ...], torch.Tensor] = {}
    for _ in range(16):
        examples = draw.sample(encoded, 8)
        batch = padded(host_batch(examples, 0, packable=FAR), 0)
        flat = kept.setdefault(shape_of(batch), flatten(batch.arrays))
        flat.copy_(flatten(batch.arrays))
        found = loss(model, task, batch.batch(unflatten(flat, batch.arrays))).value
        expected = loss(model, task, host_batch(examples, 0, packable=FAR).to("cpu")).value
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(kept) <= 4
