"""The page on tasks names what the code has."""

from pathlib import Path

import pytest

from zoft.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.mark.parametrize("name", TASKS)
def test_the_page_lists_every_task_with_its_data_set_and_words(name):
    task = TASKS[name]
    rows = [line.split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if f"`{name}`" in row[1]]
    if task.hub:
        assert f"`{task.hub.id}`" in row[2]
        assert all(f"`{word}`" in row[4] for word in task.words)
