"""docs/methods.md names every method, and no option that there is not."""

import re
from pathlib import Path

from zoft.optim import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_every_method_has_a_row_and_a_section_with_its_source() -> None:
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `([\w-]+)` \|.*$", PAGE, re.MULTILINE)}
    assert set(rows) == set(METHODS)
    for name, row in rows.items():
        assert METHODS[name].source.removeprefix("arXiv ") in row, name
    sections = [name for line in re.findall(r"^### (.*)$", PAGE, re.MULTILINE) for name in line.split(", ")]
    assert sorted(sections) == sorted(
        name for name, method in METHODS.items() if name != "zoft" and not method.first_order
    )


def test_the_options_it_names_exist() -> None:
    named = set(re.findall(r"options\.(\w+)=", PAGE)) - {"NAME"}
    assert named and named <= {option for method in METHODS.values() for option in method.fields}
