import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoft.errors import DataError
from zoft.tasks import batch_indices
from zoft.tasks.batches import length_step, pad
from zoft.tasks.types import Row, Target


@given(st.integers(1, 60), st.data(), st.integers(0, 2**63 - 1), st.integers(0, 500))
def test_an_epoch_visits_each_example_at_most_once(size, data, seed, epoch):
    batch_size = data.draw(st.integers(1, size))
    steps = size // batch_size
    seen = [i for step in range(steps) for i in batch_indices(size, batch_size, seed, epoch * steps + step)]
    assert len(seen) == len(set(seen)) == steps * batch_size
    assert set(seen) <= set(range(size))


def test_batches_depend_on_seed_and_step_alone():
    first = [batch_indices(100, 8, seed=3, step=step) for step in range(40)]
    backwards = [batch_indices(100, 8, seed=3, step=step) for step in reversed(range(40))]
    assert first == backwards[::-1]
    assert first != [batch_indices(100, 8, seed=4, step=step) for step in range(40)]
    assert first[:12] != first[12:24]  # a new epoch has a new order
    assert batch_indices(10, 4, seed=0, step=0) == [6, 1, 0, 5]  # pinned: a resumed run must see the same batches


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_larger_than_the_data_is_an_error(batch_size):
    with pytest.raises(DataError, match=f"a batch of {batch_size} from 10 training rows"):
        batch_indices(10, batch_size, 0, 0)


def test_pad_fills_on_the_left_and_moves_positions():
    rows = [Row((5, 6, 7), (Target(0, (1, 2), (8, 9)),)), Row((4,), (Target(0, (0,), (3,)), Target(1, (0,), (2,))))]
    padded = pad(rows, pad_id=0, device="cpu")
    assert padded.input_ids.tolist() == [[5, 6, 7], [0, 0, 4]]
    assert padded.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert padded.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert padded.logit_row.tolist() == [0, 0, 1]
    assert padded.logit_position.tolist() == [1, 2, 2]
    assert padded.logit.tolist() == [0, 1, 2, 2]
    assert padded.token.tolist() == [8, 9, 3, 2]
    assert padded.segment.tolist() == [0, 0, 1, 2]
    assert padded.place.tolist() == [0, 1, 0, 0]
    assert padded.counts.tolist() == [2, 1, 1]
    assert padded.input_ids.dtype == torch.int64


def test_in_half_precision_lengths_are_rounded_up_to_multiples_of_eight():
    rows = [Row(tuple(range(1, 12)), (Target(0, (10,), (11,)),)), Row((1, 2, 3), (Target(1, (2,), (3,)),))]
    exact, rounded = (
        pad(rows, pad_id=0, device="cpu", step=length_step(kind)) for kind in (torch.float32, torch.bfloat16)
    )
    assert exact.input_ids.shape == (2, 11) and rounded.input_ids.shape == (2, 16)
    assert torch.equal(rounded.input_ids[:, 5:], exact.input_ids)
    assert not rounded.attention_mask[:, :5].any() and torch.equal(rounded.attention_mask[:, 5:], exact.attention_mask)


def test_a_length_that_is_a_multiple_of_eight_stays():
    row = Row(tuple(range(1, 17)), (Target(0, (15,), (16,)),))
    assert pad([row], pad_id=0, device="cpu", step=8).input_ids.shape == (1, 16)
