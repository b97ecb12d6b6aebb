"""Built-in tasks: prompts, label words, metrics and Hub data sets, as in MeZO (arXiv 2305.17333).

SST-5, SNLI, MNLI, TREC, GSM8K, MetaMathQA and the vader sets are not in MeZO's causal suite; their prompts are ours.
The prompts of masked language models are in `zoft.tasks.cloze`.
"""

import difflib
import string
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from zoft.errors import ConfigError, DataError
from zoft.tasks import hub_data as hub
from zoft.tasks.rows import field, filled_field, index_field, text_field, texts_field
from zoft.tasks.text_metrics import exact_match, final_answer, number_match, token_f1
from zoft.tasks.types import Example, HubSource, Task

Fields = Mapping[str, Any]
Clean = Mapping[str, Callable[[str], str]]


def _classified(template: str, words: tuple[str, ...], clean: Clean, label: str, row: Fields) -> Example:
    """Classification row: the filled template without trailing spaces, and the label words."""
    return Example(_filled(template, clean, row).rstrip(" "), words, index_field(row, label, len(words)))


def _answered(template: str, clean: Clean, answers: Callable[[Fields], tuple[str, ...]], row: Fields) -> Example:
    """Generation row: the target is the first answer and a newline."""
    found = answers(row)
    return Example(_filled(template, clean, row), (f" {found[0]}\n",), answers=found)


def _filled(template: str, clean: Clean, row: Fields) -> str:
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    return template.format(**{name: clean.get(name, str)(text_field(row, name)) for name in names})


def _as_question(question: str) -> str:
    if not question:
        raise DataError('field "question" is blank, expected text')
    question = question if question.endswith("?") else question + "?"
    return question[0].upper() + question[1:]


def _boolq(row: Fields) -> Example:
    """BoolQ row: SuperGLUE has a ``label``, the authors' own data set a boolean ``answer``."""
    if "label" not in row and isinstance(row.get("answer"), bool):
        row = {**row, "label": int(row["answer"])}
    return _classified(_BOOLQ, ("No", "Yes"), {"question": _as_question}, "label", row)


def _copa(row: Fields) -> Example:
    conjunctions = {"effect": " so", "cause": " because"}
    question = text_field(row, "question")
    if question not in conjunctions:
        raise DataError(f'field "question" is "{question}", expected "cause" or "effect"')
    premise = text_field(row, "premise").rstrip().removesuffix(".")
    choices = tuple(" " + _lower_first_word(filled_field(row, name)) for name in ("choice1", "choice2"))
    return Example(premise + conjunctions[question], choices, index_field(row, "label", 2))


def _lower_first_word(sentence: str) -> str:
    first, *rest = sentence.strip(" ").split(" ")
    return " ".join([first if first == "I" else first.lower(), *rest])


def _record(row: Fields) -> Example:
    passage = text_field(row, "passage").replace("@highlight\n", "- ")
    query = text_field(row, "query")
    entities = tuple(dict.fromkeys(texts_field(row, "entities")))
    answers = texts_field(row, "answers")
    if "@placeholder" not in query:
        raise DataError('field "query" has no @placeholder')
    right = tuple(dict.fromkeys(entities.index(answer) for answer in answers if answer in entities))
    if not right:
        raise DataError(f'field "answers" is {list(answers)}, none of which is among the entities')
    choices = tuple(" " + query.replace("@placeholder", entity) for entity in entities)
    return Example(f"{passage}\n-", choices, right[0], answers=answers, also_right=right[1:])


def _squad_answers(row: Fields) -> tuple[str, ...]:
    return _nested_texts(row, "answers", "text")


def _drop_answers(row: Fields) -> tuple[str, ...]:
    return _nested_texts(row, "answers_spans", "spans")


def _nested_texts(row: Fields, outer: str, inner: str) -> tuple[str, ...]:
    found = field(row, outer)
    if not isinstance(found, Mapping):
        raise DataError(f'field "{outer}" is {type(found).__name__}, expected an object with "{inner}"')
    return texts_field({f"{outer}.{inner}": found.get(inner)}, f"{outer}.{inner}")


def _worked_solution(name: str, row: Fields) -> Example:
    """Mathematics row: the target is a worked solution that ends in its answer."""
    query, solution = {"gsm8k": ("question", "answer"), "metamathqa": ("query", "response")}[name]
    target = text_field(row, solution)
    answer = final_answer(target)
    if not answer:
        raise DataError(f'field "{solution}" names no answer, expected one after "####" or "The answer is:"')
    return Example(f"Question: {text_field(row, query)}\nAnswer:", (f" {target}\n",), answers=(answer,))


def _classification(
    name: str,
    source: HubSource | None,
    template: str,
    words: tuple[str, ...],
    clean: Clean | None = None,
    dev_size: int = 500,
    label: str = "label",
) -> Task:
    return Task(
        name,
        kind="classification",
        metric="accuracy",
        source=_shown(source),
        prompt=template,
        example=partial(_classified, template, words, clean or {}, label),
        words=words,
        target=label,
        hub=source,
        dev_size=dev_size,
    )


def _reading(
    name: str, source: HubSource, template: str, answers: Callable[[Fields], tuple[str, ...]], target: str
) -> Task:
    return Task(
        name,
        kind="generation",
        metric="f1",
        source=_shown(source),
        prompt=template,
        example=partial(_answered, template, {"question": str.strip}, answers),
        target=target,
        hub=source,
        scores={"f1": token_f1, "em": exact_match},
        stop="\n",
    )


def _mathematics(name: str, source: HubSource, prompt: str, target: str, stop: str) -> Task:
    return Task(
        name,
        kind="generation",
        metric="em",
        source=_shown(source),
        prompt=prompt,
        example=partial(_worked_solution, name),
        target=target,
        hub=source,
        scores={"em": number_match},
        stop=stop,
        max_new_tokens=256,
    )


def _shown(source: HubSource | None) -> str:
    return " ".join(filter(None, (source.id, source.config))) if source else "--data DIR"


_BOOLQ = "{passage} {question}\n"
_NLI = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
_SENTIMENT = (" terrible", " great")
_COPA = Task(
    "copa",
    kind="choice",
    metric="accuracy",
    source=_shown(hub.COPA),
    prompt="{premise} so|because {choice}",
    example=_copa,
    target="choice1",
    hub=hub.COPA,
    dev_size=100,
)
_RECORD = Task(
    "record",
    kind="choice",
    metric="accuracy",
    source=_shown(hub.RECORD),
    prompt="{passage}\n- {query with an entity}",
    example=_record,
    target="entities",
    hub=hub.RECORD,
)
_WSC = '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'
_WIC = 'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
_MULTIRC = '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
_RTE = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'
_SST5_WORDS = (" terrible", " bad", " okay", " good", " great")
_TREC_WORDS = (" an abbreviation", " an entity", " a description", " a person", " a place", " a number")


def _sentiment(name: str, source: HubSource | None = None) -> Task:
    return _classification(name, source, "{sentence} It was", _SENTIMENT, {"sentence": str.strip})


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _sentiment("sst2", hub.SST2),
        _classification("rte", hub.RTE, _RTE, ("Yes", "No")),
        _classification("cb", hub.CB, _NLI, ("Yes", "No", "Maybe"), dev_size=100),
        replace(_classification("boolq", hub.BOOLQ, _BOOLQ, ("No", "Yes")), example=_boolq),
        _classification("wsc", hub.WSC, _WSC, ("No", "Yes"), {"span2_text": str.lower}, dev_size=100),
        _classification("wic", hub.WIC, _WIC, ("No", "Yes")),
        _classification("multirc", hub.MULTIRC, _MULTIRC, ("No", "Yes")),
        _COPA,
        _RECORD,
        _reading(
            "squad",
            hub.SQUAD,
            "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
            _squad_answers,
            "answers",
        ),
        _reading("drop", hub.DROP, "Passage: {passage}\nQuestion: {question}\nAnswer:", _drop_answers, "answers_spans"),
        _classification("sst5", hub.SST5, "{text} It was", _SST5_WORDS, {"text": str.strip}),
        _classification("snli", hub.SNLI, _NLI, ("Yes", "Maybe", "No")),
        _classification("mnli", hub.MNLI, _NLI, ("Yes", "Maybe", "No")),
        _classification(
            "trec", hub.TREC, "{text} The answer is about", _TREC_WORDS, {"text": str.strip}, label="coarse_label"
        ),
        _mathematics("gsm8k", hub.GSM8K, "Question: {question}\nAnswer:", "answer", r"####[^\n]*\n"),
        _mathematics(
            "metamathqa",
            hub.METAMATHQA,
            "Question: {query}\nAnswer:",
            "response",
            r"(####|The answer is:)[^\n]*\n",
        ),
        _sentiment("vader_movie"),
        _sentiment("vader_tweets"),
        _sentiment("vader_amazon"),
    )
}


def get_task(name: str) -> Task:
    """Return the built-in task ``name``; any ``vader_<x>`` is SST-2 with rows from ``--data``.

    Raises `ConfigError` with the nearest names for an unknown task.

    >>> get_task("rte").words
    ('Yes', 'No')
    """
    if name in TASKS:
        return TASKS[name]
    if name.startswith("vader_") and len(name) > len("vader_"):
        return replace(TASKS["vader_movie"], name=name)
    close = difflib.get_close_matches(name.lower().replace("-", ""), TASKS, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(f'no task "{name}"{hint} The tasks are {", ".join(TASKS)}; `--data` alone takes your own data.')
