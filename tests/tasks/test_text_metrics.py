import pytest

from zoft.tasks.text_metrics import exact_match, final_answer, normalise, number_match, token_f1


def test_normalise_drops_case_punctuation_articles_and_spaces():
    assert normalise(" The  Big-Apple,\ta city ") == "bigapple city"
    assert normalise("theatre another") == "theatre another"  # articles only as whole words


@pytest.mark.parametrize(
    ("prediction", "answers", "f1", "em"),
    [
        ("The cat.", ["a cat"], 1.0, 1.0),
        ("black cat", ["cat"], 2 / 3, 0.0),
        ("cat cat", ["cat dog"], 1 / 2, 0.0),  # a token counts as often as both have it
        ("dog", ["cat", "dog"], 1.0, 1.0),
        ("", ["cat"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("no answer is known", ["no answer"], 0.0, 0.0),  # unanswerable: all or nothing
        ("No answer", ["no answer"], 1.0, 1.0),
    ],
)
def test_f1_and_exact_match(prediction, answers, f1, em):
    assert token_f1(prediction, answers) == pytest.approx(f1)
    assert exact_match(prediction, answers) == em


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("2+3=5\n#### 5", "5"),
        ("#### 4\nno, wait\n#### $1,234.50 ", "1234.50"),
        ("so\n#### 18 dollars", "18"),
        ("#### -7.", "-7"),
        ("####\n12", ""),
        ("thus\n#### 3\nThe answer is: 4", "3"),
        ("The answer is: \\frac{1}{2}", "\\frac{1}{2}"),
        ("it is 5", ""),
    ],
)
def test_final_answer(solution, answer):
    assert final_answer(solution) == answer


def test_number_match_compares_as_numbers_and_needs_an_answer():
    assert number_match("x\n#### 18.0", ["18"]) == 1
    assert number_match("x\n#### 1,018", ["1018"]) == 1
    assert number_match("x\n#### 15", ["1.5"]) == 0
    assert number_match("x\n#### -3", ["3"]) == 0
    assert number_match("18", ["18"]) == 0
    assert number_match("The answer is: x+1", ["x+1"]) == 1
