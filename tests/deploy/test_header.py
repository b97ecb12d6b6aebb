import pytest

from zoft.deploy.header import data_hash
from zoft.tasks import TASKS, Encoded, Example, Prepared
from zoft.tasks.types import Row, Target

CHOICES = Encoded(
    Example('it\'s "good"\n\ud7ffé', (" bad", " good"), 1, also_right=(0,)),
    rows=(Row((5, 6, 7), (Target(0, (2,), (8,)), Target(1, (2,), (9,)))),),
    loss_rows=(Row((5, 6, 7), (Target(0, (2,), (8,)), Target(1, (2,), (9,)))),),
)
QUESTION = Encoded(
    Example("What?", (" that\n",), answers=("that",), suffix=" not hashed"),
    rows=(Row((1, 2, 3), (Target(0, (1, 2), (3, 4)),)), Row((), ())),
    loss_rows=(Row((1, 2, 3), (Target(0, (1, 2), (3, 4)),)),),
    prompt_ids=(1,),
)
TEXT = Encoded(Example("", ("A text.",), spans=((0, 1), (2, 7))), (), ())


def test_the_data_hash_is_that_of_release_0_1() -> None:
    """Computed by zoft 0.1; another value would refuse to resume every run folder there is."""
    prepared = Prepared(TASKS["sst2"], (CHOICES, QUESTION), (TEXT,), (CHOICES,))
    assert data_hash(prepared) == "6327ddda0a11e963946237ce45c8928d20398f36979c718270abc2ee2c5e3ba4"


@pytest.mark.parametrize(
    ("train", "dev", "test", "same"),
    [
        ((CHOICES, QUESTION), (TEXT,), (), True),  # the test split decides nothing
        ((QUESTION, CHOICES), (TEXT,), (CHOICES,), False),
        ((CHOICES, QUESTION, TEXT), (), (CHOICES,), False),
    ],
)
def test_the_data_hash_is_of_train_and_dev_in_order(train, dev, test, same) -> None:
    expected = data_hash(Prepared(TASKS["sst2"], (CHOICES, QUESTION), (TEXT,), (CHOICES,)))
    assert (data_hash(Prepared(TASKS["sst2"], train, dev, test)) == expected) is same
