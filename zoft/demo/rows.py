"""Generate two small classification tasks: the verdict of a sentence, and its topic."""

import hashlib
import itertools
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoft.files import write_text

SIZES = {"train": 408, "dev": 72, "test": 96}


@dataclass(frozen=True)
class MadeTask:
    """A classification task whose sentences are templates filled with the words of a label.

    ``words`` has one mapping for each label, from the fields of the templates to their possible words; ``ending`` asks
    for the label, ``choices`` are the answers in the order of the labels.
    """

    name: str
    templates: tuple[str, ...]
    words: tuple[Mapping[str, Sequence[str]], ...]
    ending: str
    choices: tuple[str, ...]

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of each split: as many of every template and label, no sentence in two splits.

        They are the same on every machine: sentences are drawn in the order of their SHA-256.

        >>> VERDICT.rows()["dev"][0]["choices"]
        [' terrible', ' great']
        """
        splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SIZES}
        for template, label in itertools.product(self.templates, range(len(self.choices))):
            drawn = iter(sorted(_filled(template, self.words[label]), key=_digest))
            for split, size in SIZES.items():
                chosen = itertools.islice(drawn, size // (len(self.choices) * len(self.templates)))
                splits[split] += [self._row(sentence, label) for sentence in chosen]
        return {split: sorted(rows, key=lambda row: _digest(row["prompt"])) for split, rows in splits.items()}

    def write(self, folder: Path) -> Path:
        """Write ``train``, ``dev`` and ``test.jsonl`` to ``folder`` and return it."""
        for split, rows in self.rows().items():
            write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return folder

    def _row(self, sentence: str, label: int) -> dict[str, Any]:
        return {"prompt": f"{sentence} {self.ending}", "choices": list(self.choices), "label": label}


_THINGS = ("film", "meal", "hotel", "concert", "novel", "flight", "play", "game", "lecture", "trip", "song", "service")
GOOD = ("wonderful", "charming", "delightful", "excellent", "moving", "brilliant", "superb", "lovely", "thrilling")
BAD = ("dull", "awful", "clumsy", "boring", "dreadful", "tedious", "messy", "annoying", "pointless")

VERDICT = MadeTask(
    name="verdict",
    # {word} is the verdict, {other} a word that means the opposite: counting good and bad words is not enough.
    templates=(
        "The {thing} was {word} from start to finish.",
        "I found the {thing} {word}, and so did my family.",
        "How {word} the {thing} was!",
        "All evening we talked about how {word} the {thing} had been.",
        "Of everything that week, the {thing} was the most {word}.",
        "At first the {thing} seemed {other}, but it turned out {word}.",
        "My friends called the {thing} {other}; to me it was {word}.",
        "The {thing} looked {other} in the pictures and proved {word}.",
        "Only the first minutes of the {thing} were {other}, the rest was {word}.",
        "Nobody could call the {thing} {other}.",
        "There was nothing {other} about the {thing}.",
        "The {thing} was far from {other}.",
    ),
    words=(
        {"thing": _THINGS, "word": BAD, "other": GOOD},
        {"thing": _THINGS, "word": GOOD, "other": BAD},
    ),
    ending="It was",
    choices=(" terrible", " great"),
)

_PEOPLE = ("Anna", "Ben", "my sister", "our neighbour", "the teacher", "Maria", "her uncle", "Tom")
NOUNS = (
    ("soup", "bread", "cheese", "pasta", "salad", "butter", "noodles", "pie", "rice", "stew"),
    ("piano", "violin", "choir", "guitar", "opera", "drums", "trumpet", "melody", "flute", "cello"),
    ("goal", "referee", "marathon", "tennis", "stadium", "coach", "boxing", "league", "hockey", "rugby"),
    ("train", "airport", "suitcase", "hotel", "passport", "ferry", "luggage", "harbour", "map", "beach"),
)

TOPIC = MadeTask(
    name="topic",
    templates=(
        "Yesterday {person} spoke for an hour about the {noun}.",
        "Nothing interests {person} as much as the {noun}.",
        "After work {person} read an article on the {noun} and the {also}.",
        "There was a photograph of the {noun} on the desk of {person}.",
        "First came the {noun}, then the {also}, and {person} was happy.",
        "What {person} remembers of that summer is the {noun}.",
    ),
    words=tuple({"person": _PEOPLE, "noun": nouns, "also": nouns[::-1]} for nouns in NOUNS),
    ending="The topic is",
    choices=(" food", " music", " sport", " travel"),
)


def _filled(template: str, words: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield every sentence that a template makes, without repeated words."""
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    for chosen in itertools.product(*(words[field] for field in fields)):
        if len(set(chosen)) == len(chosen):
            yield template.format(**dict(zip(fields, chosen, strict=True)))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
