"""Few-shot data: K train and K dev rows of every class, drawn as in LM-BFF (arXiv 2012.15723) and MeZO."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from zoft.errors import ConfigError, DataError
from zoft.tasks.rows import Located
from zoft.tasks.types import Split, Task


def shuffled(rows: Sequence[Located], seed: int) -> list[Located]:
    """Return ``rows`` in an order drawn by ``seed``."""
    return [rows[int(place)] for place in np.random.RandomState(seed % 2**32).permutation(len(rows))]


def draw(task: Task, pool: Iterable[Located], shots: int) -> tuple[dict[Split, list[Located]], list[str]]:
    """Return the first ``shots`` rows of every class as train and the next ``shots`` as dev, with warnings.

    The rows of a class that has fewer go to train first, as in LM-BFF, with a warning.

    Raises:
        ConfigError: the task has no classes.
        DataError: a class of the task has no row, or no row is left for dev.
    """
    if task.kind != "classification":
        raise ConfigError(f"{task.name} ({task.kind}) has no classes to take {shots} rows of; leave out --shots")
    classes: dict[int, list[Located]] = defaultdict(list)
    for located in pool:
        try:
            label = task.example(located.row).label
        except DataError as error:
            raise DataError(f"{located.place}: {error}") from error
        if len(classes[label]) < 2 * shots:
            classes[label].append(located)
        if task.words and len(classes) == len(task.words) and all(len(c) == 2 * shots for c in classes.values()):
            break
    found = {label: classes[label] for label in sorted(classes)}
    if empty := [label for label in range(len(task.words)) if label not in found]:
        raise DataError(f"{task.name}: no training row has label {empty[0]}; expected {shots} rows of every class")
    train = [row for rows in found.values() for row in rows[:shots]]
    dev = [row for rows in found.values() for row in rows[shots:]]
    if not dev:
        raise DataError(
            f"{task.name}: its largest class has {max(map(len, found.values()))} training rows, all of them for "
            f"training; expected {2 * shots} of every class: lower --shots"
        )
    short = ", ".join(f"label {label}: {len(rows)}" for label, rows in found.items() if len(rows) < 2 * shots)
    warnings = [f"too few training rows of some classes for {shots} of train and {shots} of dev each ({short})"]
    return {"train": train, "dev": dev}, warnings if short else []
