"""One comparison: plan its meta-trainings and runs, carry them out, and report on them."""

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.transfer import picture
from benchmarks.transfer.bench import Bench, Runs
from benchmarks.transfer.folder import Folder
from benchmarks.transfer.learning import Learning, Say
from benchmarks.transfer.plan import METHODS, PRESETS, Cell, Done, Method, cells_of, pairs
from benchmarks.transfer.report import costs, entries, table
from zoft import registry
from zoft.compare.report import machine, plain
from zoft.files import write_text
from zoft.model import fingerprint
from zoft.model.sources import resolve

WAIT = 5  # seconds, while other processes hold all remaining items


class Comparison:
    """The runs that the command line asks for, in a folder that other processes may share."""

    def __init__(self, arguments: argparse.Namespace, say: Say) -> None:
        self._say = say
        base = resolve(arguments.model).path
        self.folder = Folder(arguments.work)
        self.seeds = range(1, arguments.seeds + 1)
        self.methods = _methods(arguments)
        self._by_label = {method.label: method for method in self.methods}
        self.tasks = arguments.task or _all_tasks(arguments.data, self.methods)
        common = ("batch_size", "eps", "train_size", "dtype")
        own = ("steps", "dev_size", "checks", "meta_steps")
        self.settings = {key: getattr(arguments, key) for key in (*common, *own)}
        self.folder.open(self.settings | {"base": fingerprint.base_hash(base)})
        # Cards of a benchmark stay out of the user's store, where `--tuner auto` would find them.
        os.environ["ZOFT_HOME"] = str(arguments.work.resolve() / "home")
        place = {"model": str(base), "data": arguments.data, "device": arguments.device}
        self.learning = Learning(
            self.folder, place | {key: self.settings[key] for key in common}, arguments.meta_steps, say
        )
        settings = {key: self.settings[key] for key in (*common, "steps", "dev_size", "checks")}
        self._runs = Runs(**place, **settings)
        self._bench: Bench | None = None

    def run(self) -> None:
        """Meta-train and run until nothing is left, skipping items that other processes hold."""
        if left := self._left():
            cells = [item for item in left if isinstance(item, Cell)]
            self._say(
                f"{len(left) - len(cells)} tuners to learn, {len(cells)} runs of {2 * self._runs.steps} forwards; "
                "more where a best rate is at an edge"
            )
        while left := self._left():
            if not any(self._done_by_us(item) for item in left):
                time.sleep(WAIT)

    def _left(self) -> list[Method | Cell]:
        """Tuners to learn, then the cells whose method is ready."""
        wanted = pairs(self.methods, self.tasks)
        needed = dict.fromkeys(method for _, method in wanted)
        done = self.folder.done()
        missing: list[Method | Cell] = [method for method in needed if not self.learning.ready(method)]
        for task, method in wanted:
            missing += [cell for cell in cells_of(task, method.label, self.seeds, done) if cell not in done]
        return missing

    def _done_by_us(self, item: Method | Cell) -> bool:
        """Do ``item``, unless it is not ready yet, or another process holds it or has done it."""
        method = item if isinstance(item, Method) else self._by_label[item.method]
        if isinstance(item, Cell) and not self.learning.ready(method):
            return False
        with self.folder.claimed(item.name if isinstance(item, Cell) else item.label) as ours:
            if not ours or (self.folder.has(item) if isinstance(item, Cell) else self.learning.ready(item)):
                return False
            if isinstance(item, Method):
                self._bench = None  # so that there are never two bases in memory
                self.learning.make(item)
            else:
                self._run(item, method)
        return True

    def _run(self, cell: Cell, method: Method) -> None:
        if self._bench is None:
            self._bench = Bench(self._runs, self.learning)
        outcome = self._bench.run(cell, method)
        self.folder.keep(outcome)
        self._say(f"{cell.name}: {outcome.curve[0][1]:.3f} -> {outcome.loss:.3f}; {self._time_left(self._bench)}")

    def _time_left(self, bench: Bench) -> str:
        """How long the remaining known runs take one process, from the mean time of a token so far."""
        done = self.folder.done()
        cells = [item for item in self._left() if isinstance(item, Cell)]
        seconds = sum(
            2 * self._runs.steps * bench.tokens(cell.task) * _seconds_per_token(done, cell.task) for cell in cells
        )
        return f"{len(cells)} runs left, about {seconds / 60:.0f} min for one process"

    # -- what came of it ----------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Write ``transfer.json``, ``.md`` and ``.png`` from the finished cells; return the tables."""
        done = self.folder.done()
        found = entries(self.methods, self.tasks, self.seeds, done)
        priced = [(method, self.learning.cost(method)) for method in self.methods]
        text = "\n\n".join([self._caption(), table(self.methods, self.tasks, found), costs(priced)])
        everything = {
            "settings": self.settings,
            "machine": machine(),
            "tuners": {method.label: cost for method, cost in priced},
            "best": [asdict(entry) for entry in found],
            "cells": [json.loads(outcome.to_json()) for outcome in done.values()],
        }
        write_text(self.folder.path / "transfer.json", json.dumps(plain(everything), indent=1) + "\n")
        write_text(self.folder.path / "transfer.md", text + "\n")
        if found:
            picture.draw(found, self.folder.path / "transfer.png")
        return text

    def _caption(self) -> str:
        runs = self._runs
        return (
            f"Dev loss ({runs.dev_size} rows) after {2 * runs.steps} forwards of {runs.batch_size} examples, "
            f"{runs.dtype}, mean of {len(self.seeds)} seeds, each method at its best learning rate (in brackets, with "
            "the share of MeZO's forwards after which it was at the loss where MeZO ends)."
        )


def _methods(arguments: argparse.Namespace) -> list[Method]:
    """Return the methods that the command line asks for; given cards replace meta-trainings."""
    if unknown := sorted(set(arguments.method) - set(METHODS)):
        raise SystemExit(f"no method {unknown[0]}; there are {', '.join(METHODS)}")
    cards = [(file, registry.Card.load(file)) for file in arguments.tuner or []]
    learned_on = [tuple(names.split(",")) for names in arguments.trained_on]
    if cards:
        learned_on = list(
            dict.fromkeys(card.metadata.training.tasks for _, card in cards if card.metadata.training.tasks)
        )
    found = [Method("mezo")]  # what every other is compared with
    for tasks in learned_on:
        names = [name for name in arguments.method if name == "energy" or (name in PRESETS and not cards)]
        found += [Method(name, tasks) for name in names]
    return found + [Method(f"card-{card.digest[:8]}", card.metadata.training.tasks, str(file)) for file, card in cards]


def _all_tasks(data: Path, methods: list[Method]) -> list[str]:
    """Return every task of ``data`` except those that all tuners have seen."""
    learned = [set(method.tasks) for method in methods if method.tasks]
    seen = set.intersection(*learned) if learned else set()
    return sorted({folder.name for folder in data.iterdir() if folder.is_dir()} - seen)


def _seconds_per_token(done: Done, task: str) -> float:
    """Of the runs on ``task``, or where there are none of all."""
    own = [outcome for outcome in done.values() if outcome.cell.task == task] or list(done.values())
    return sum(outcome.seconds for outcome in own) / sum(outcome.tokens for outcome in own)
