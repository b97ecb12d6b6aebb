"""The page on tasks names what the code has."""

from pathlib import Path

import pytest

from zoft.tasks import CLOZES, TASKS

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.mark.parametrize("name", TASKS)
def test_the_page_lists_every_task_with_its_data_set_and_words(name):
    task = TASKS[name]
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if f"`{name}`" in row[1] and len(row) == 8]  # not that of cloze prompts
    if task.hub:
        assert f"`{task.hub.id}`" in row[2]
        assert all(f"`{word}`" in row[4] for word in task.words)


@pytest.mark.parametrize("name", CLOZES)
def test_the_page_lists_every_cloze_prompt(name):
    prompt, words = CLOZES[name]
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if f"| `{prompt}` |" in line]
    shown = ", ".join(f"`{word.strip()}`" for word in words)
    name = "vader_*" if name.startswith("vader_") else name
    assert [row for row in rows if f"`{name}`" in row and row.endswith(f"| {shown} |")]
