"""Metrics of generated text: SQuAD's F1 and exact match (arXiv 1606.05250), final answers of solutions."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\$?\s*(?P<number>-?\d[\d,]*(\.\d+)?)(\s+\w+|\s*%)?")
_UNANSWERABLE = ("CANNOTANSWER", "no answer")


def normalise(answer: str) -> str:
    """Lower-case; drop punctuation, articles and repeated spaces.

    >>> normalise("The  Broncos'  win.")
    'broncos win'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the normalised prediction equals any normalised answer, else 0."""
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 with the closest answer; exact match where the first answer is that the question has none.

    >>> round(token_f1("in the Denver Broncos", ["Denver Broncos", "Broncos"]), 3)
    0.8
    """
    if answers[0] in _UNANSWERABLE:
        return exact_match(prediction, answers[:1])
    return max(_pair_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def _pair_f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))


def final_answer(solution: str) -> str:
    """The answer of a worked solution: what follows the last ``####``, else the last ``The answer is:``; "" if neither.

    >>> final_answer("9 * 2 = 18 dollars.\\n#### $1,018")
    '1018'
    """
    for marker in ("####", "The answer is:"):
        _, found, rest = solution.rpartition(marker)
        if found:
            return _plain(rest.split("\n")[0])
    return ""


def _plain(answer: str) -> str:
    """The number in an answer, without thousands separators; the answer itself if it is not a plain number."""
    answer = answer.strip().rstrip(".")
    number = _NUMBER.fullmatch(answer)
    return number["number"].replace(",", "") if number else answer


def number_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction's final answer is one of ``answers``, as a number where both are numbers, else 0."""
    found = final_answer(prediction)
    return float(any(_equal(found, answer) for answer in answers))


def _equal(found: str, answer: str) -> bool:
    try:
        return float(found) == float(answer)
    except ValueError:
        return found == answer
