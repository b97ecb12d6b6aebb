import math

import pytest
import torch

from tests.tasks.conftest import make_task
from tests.tasks.test_losses import EXAMPLES, plain_scores
from zoft.errors import ConfigError, DataError
from zoft.tasks import evaluate, objective, objectives
from zoft.tasks.evaluate import by_length
from zoft.tasks.text_metrics import exact_match, token_f1
from zoft.tasks.types import Example

ACCURACY = make_task("classification")


def test_predictions_rank_by_mean_log_prob_in_the_order_of_the_examples(tiny_model, encode, tokenizer):
    model = tiny_model("llama")
    found = evaluate(model, tokenizer, ACCURACY, encode(ACCURACY, EXAMPLES), batch_size=2)
    expected = tuple(int(plain_scores(model, tokenizer, example).argmax()) for example in EXAMPLES)
    assert found.predictions == expected
    right = [p == e.label for p, e in zip(expected, EXAMPLES, strict=True)]
    assert found.metric == pytest.approx(sum(right) / 3)
    assert (found.metric_name, found.examples) == ("accuracy", 3)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_batch_size_changes_no_score(batch_size, tiny_model, encode, tokenizer):
    model = tiny_model("opt")
    encoded = encode(ACCURACY, EXAMPLES * 3)
    one = evaluate(model, tokenizer, ACCURACY, encoded, batch_size=batch_size)
    other = evaluate(model, tokenizer, ACCURACY, encoded, batch_size=5)
    assert one.loss == pytest.approx(other.loss, abs=1e-5)
    assert (one.predictions, one.tokens) == (other.predictions, other.tokens)
    assert evaluate(model, tokenizer, ACCURACY, encoded, batch_size=batch_size) == one


def test_every_right_choice_counts(tiny_model, encode, tokenizer):
    model, task = tiny_model("llama"), make_task("choice")
    best = int(plain_scores(model, tokenizer, EXAMPLES[0]).argmax())
    wrong = next(i for i in range(3) if i != best)
    for also, metric in ((), 0.0), ((best,), 1.0):
        example = Example(EXAMPLES[0].prompt, EXAMPLES[0].choices, wrong, also_right=also)
        assert evaluate(model, tokenizer, task, encode(task, [example]), batch_size=4).metric == metric


def test_perplexity_of_text(tiny_model, encode, tokenizer):
    task = make_task("text")
    found = evaluate(tiny_model("llama"), tokenizer, task, encode(task, [Example("", ("It was great",))]), batch_size=1)
    assert found.metric == pytest.approx(math.exp(found.loss))
    assert found.predictions == ()


def test_progress_ends_at_its_total_and_training_mode_comes_back(tiny_model, encode, tokenizer):
    model, seen = tiny_model("llama").train(), []
    encoded = encode(ACCURACY, EXAMPLES)
    evaluate(model, tokenizer, ACCURACY, encoded, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    rows = sum(len(one.rows) for one in encoded)
    assert seen[-1] == (rows, rows) and len(seen) == math.ceil(len(encoded) / 2)  # two examples at a time, packed
    assert model.training


def test_an_empty_split_is_an_error(tiny_model, tokenizer):
    with pytest.raises(DataError, match="has no rows"):
        evaluate(tiny_model("llama"), tokenizer, ACCURACY, [], batch_size=1)


def test_batches_are_bounded_by_tokens():
    lengths = [9000, 5, 9000, 8000, 8000, 5]
    assert [len(part) for part in by_length(lengths, lambda n: n, 4)] == [1, 1, 2, 2]
    assert [max(part) for part in by_length(lengths, lambda n: n, 4)] == [9000, 9000, 8000, 5]


def test_accuracy_objective_is_the_share_of_wrong_predictions(tiny_model, encode, tokenizer):
    model = tiny_model("llama")
    encoded = encode(ACCURACY, EXAMPLES)
    accuracy = evaluate(model, tokenizer, ACCURACY, encoded, batch_size=4).metric
    found = objective("accuracy", ACCURACY, tokenizer, batch_size=2)(model, encoded)
    assert found.value.item() == pytest.approx(1 - accuracy)
    assert found.weight == 3
    assert not found.total.requires_grad


def test_generation_objectives_are_one_minus_the_metric(tiny_model, encode, tokenizer):
    model = tiny_model("llama")
    task = make_task("generation", scores={"f1": token_f1, "em": exact_match}, max_new_tokens=4)
    (text,) = evaluate(
        model, tokenizer, task, encode(task, [Example("It was", (" x",), answers=("x",))]), batch_size=1
    ).predictions
    examples = [Example("It was", (" x",), answers=answers) for answers in ((text,), (f"{text} more",), ("zzz",))]
    encoded = encode(task, examples)
    values = {
        name: objective(name, task, tokenizer, batch_size=2)(model, encoded).value.item() for name in ("f1", "em")
    }
    assert values["em"] == pytest.approx(2 / 3)
    assert values["f1"] == pytest.approx(1 - (1 + token_f1(text, [f"{text} more"])) / 3)


def test_loss_objective_and_callable(tiny_model, encode, tokenizer):
    model = tiny_model("llama")
    encoded = encode(ACCURACY, EXAMPLES)
    value = objective("loss", ACCURACY, tokenizer, batch_size=2)(model, encoded).value
    assert value.requires_grad
    assert value.item() == pytest.approx(evaluate(model, tokenizer, ACCURACY, encoded, batch_size=2).loss, abs=1e-5)
    own = objective(lambda m, batch: len(batch) + 0.5, ACCURACY, tokenizer, batch_size=2)
    both = own(model, encoded[:1]) + own(model, encoded[1:])
    assert both.value.item() == pytest.approx((1.5 + 2 * 2.5) / 3)


def test_objectives_that_do_not_fit_are_an_error(tokenizer):
    assert objectives(ACCURACY) == ("loss", "accuracy")
    assert objectives(make_task("text")) == ("loss",)
    with pytest.raises(ConfigError, match=r'objective "f1" does not fit classification .* expected loss or accuracy'):
        objective("f1", ACCURACY, tokenizer, batch_size=1)


def test_zeroth_order_steps_on_accuracy_need_no_gradient(tiny_model, encode, tokenizer):
    model = tiny_model("llama").requires_grad_(False)
    found = objective("accuracy", ACCURACY, tokenizer, batch_size=4)(model, encode(ACCURACY, EXAMPLES))
    assert 0 <= found.value.item() <= 1
    assert torch.isfinite(found.total)


def test_a_choice_that_is_not_a_number_is_not_a_wrong_answer(tiny_model, encode, tokenizer):
    """NaN compares with nothing: the first choice would win, and the accuracy would be one like any other."""
    model = tiny_model("llama")
    model.model.norm.weight.data[0] = torch.nan
    task = make_task("classification")
    encoded = encode(task, [Example("It was", (" great", " terrible"), label=0)])
    assert objective("accuracy", task, tokenizer, batch_size=4)(model, encoded).value.isnan()
