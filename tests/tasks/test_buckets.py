"""Batches filled up to a bucket: the same loss, few shapes, and tensors of one shape that take another's numbers."""

import random

import pytest
import torch

from tests.conftest import FAMILIES
from tests.tasks.conftest import make_task
from tests.tasks.test_losses import EXAMPLES
from tests.tasks.test_packing import FAR, made
from zoft.memory import joined, views
from zoft.tasks import loss
from zoft.tasks.batches import lay_out
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
        laid = lay_out(encoded[:count], 0, packable=FAR)
        full = padded(laid, 7)
        assert all(array.size >= laid.arrays[name].size for name, array in full.arrays.items())
        assert len(full.arrays["counts"]) > len(laid.arrays["counts"])
        expected, found = (loss(model, task, one.to("cpu")) for one in (laid, full))
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
        batch = draw.sample(encoded, 8)
        laid = padded(lay_out(batch, 0, packable=FAR), 0)
        flat = kept.setdefault(shape_of(laid), joined(laid.arrays))
        flat.copy_(joined(laid.arrays))
        found = loss(model, task, laid.batch(views(flat, laid.arrays))).value
        expected = loss(model, task, lay_out(batch, 0, packable=FAR).to("cpu")).value
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(kept) <= 4
