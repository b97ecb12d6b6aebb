"""Read mutated files: a reader must return a value or raise a `ZoftError`, in bounded memory."""

import io
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.fuzz.mutate import damaged_card, damaged_header, damaged_journal, damaged_pickle
from zoft.deploy.journal import EndLine, EvalLine, HeaderLine, Journal, StepLine, TunerUsed, read_journal
from zoft.errors import ZoftError
from zoft.optim import StepRecord
from zoft.registry import (
    BaseSpec,
    BlockSpec,
    Card,
    EvidenceRow,
    Found,
    ModelIdentity,
    Recommended,
    TunerCard,
    first_scales,
    pack,
    read_released,
    sample_weights,
)
from zoft.registry.hub.page import Publication, render
from zoft.registry.match.candidates import rank
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import Block, architecture_hash, trainable_blocks

KINDS = ("card", "header", "journal", "pickle")
EXTRA_MEMORY = 400_000_000  # bytes of address space that a reader may take beyond what the process has


@dataclass
class Report:
    """Outcome of the mutations of one kind; ``slowest`` in seconds, ``failures`` those that broke a reader."""

    kind: str
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def fuzz(kind: str, mutations: int, seed: int = 0) -> Report:
    """Read ``mutations`` damaged files of a ``kind``, the same for the same seed."""
    report = Report(kind)
    with tempfile.TemporaryDirectory() as folder:
        mutate, read = _subject(kind, Path(folder))
        for number in range(mutations):
            content = mutate(random.Random(f"{seed}/{kind}/{number}"))
            begin = time.perf_counter()
            try:
                read(content)
                report.outcomes["read"] += 1
            except ZoftError as error:
                report.outcomes["refused"] += 1
                if not str(error).isprintable() or len(str(error)) > 1000:
                    report.failures.append(f"{kind} {number}: an error that is no plain text: {str(error)[:200]!a}")
            except Exception as error:  # this is what the fuzzer looks for
                report.failures.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:200]!a}")
            report.slowest = max(report.slowest, time.perf_counter() - begin)
    return report


@contextmanager
def limited_memory(extra: int = EXTRA_MEMORY) -> Iterator[None]:
    """Let the process have ``extra`` bytes of address space more than it has now; beyond it there is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _subject(kind: str, folder: Path) -> tuple[Callable[[random.Random], bytes], Callable[[bytes], object]]:
    """How to make a damaged file of a ``kind``, and how to read it."""
    file = folder / "file"

    def from_file(reader: Callable[[Path], object]) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            file.write_bytes(content)
            return reader(file)

        return read

    if kind == "card":
        card = _card()
        return lambda draw: damaged_card(card, draw), lambda content: Card.parse(content).content
    if kind == "header":
        card, model = _card(), _identity()
        return lambda draw: damaged_header(card, draw), lambda content: _used(Card.parse(content), model)
    if kind == "journal":
        content = _journal(folder / "journal")
        return lambda draw: damaged_journal(content, draw), from_file(read_journal)
    pickled = _pickled()
    return lambda draw: damaged_pickle(pickled, draw), from_file(read_released)


def _used(card: Card, model: ModelIdentity) -> object:
    """What is done with a card that was read: its digest, how it fits, its scales, its page."""
    page = render(card, Publication("org/tuner"))
    if (page.count("<!-- zoft: begin"), page.count("<!-- zoft: end -->")) != (1, 1):
        raise AssertionError("the page does not have each mark once")
    scales = first_scales(card) if card.metadata.base.hash is not None else None
    return card.digest, rank([Found(card, "file", "here")], model)[0].match.kind, scales


def _blocks() -> list[Block]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {
                "layers": torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)]),
                "head": torch.nn.Linear(3, 2),
            }
        )
    return trainable_blocks(model)


def _identity() -> ModelIdentity:
    blocks = _blocks()
    known = ["org/base"]
    return ModelIdentity("ab" * 32, blocks, sample_weights(blocks), known, architecture_hash=architecture_hash(blocks))


def _card() -> Card:
    blocks = _blocks()
    network, tensors = pack(PertNN([block.name for block in blocks], hidden=4))
    row = EvidenceRow(
        name="tuner", task="sst2", split="dev", lr=1e-5, eps=1e-3, forwards=40, seed=0, loss_start=1.0, loss=0.5
    )
    said = TunerCard(
        base=BaseSpec(id="org/base", hash="ab" * 32, architecture_hash=architecture_hash(blocks)),
        blocks=tuple(BlockSpec(name=block.name, shape=block.shape) for block in blocks),
        network=network,
        evidence=(row, row),
        verdict="a tuner",
        recommended=Recommended(lr=1e-5, eps=1e-3),
        created="2026-11-24",  # type: ignore[arg-type]  # pydantic reads it
    )
    facts = {"base.statistics": torch.ones(len(blocks), 2), "base.samples": sample_weights(blocks)}
    return Card(said, tensors | facts)


def _journal(path: Path) -> bytes:
    journal = Journal(path)
    config = {"method": "zoft", "seed": 7, "model": "org/base"}
    used = TunerUsed(digest="cd" * 32, source="auto", base="org/base", match="same base")
    journal.append(
        HeaderLine(
            base="org/base", base_hash="ab" * 32, config=config, lr=1e-6, eps=1e-3, dtype="float32", device="cpu",
            threads=2, noise="table-1", versions={"zoft": "0"}, tuner=used,
        )
    )  # fmt: skip
    for step in range(3):
        record = StepRecord(
            step, 7, (1e-6,), 1e-3, ((1.25, float("inf") if step == 1 else 1.0),), (1.0, 0.5), {"k": 1.5}
        )
        journal.append(StepLine.of(record))
        journal.append(EvalLine(step=step + 1, loss=0.5, metric=0.7, kept=True, seconds=1.0))
    journal.append(EndLine(kept=1, sha256="00", result={"steps": 3, "out": "runs/zoft"}))
    journal.close()
    return path.read_bytes()


def _pickled() -> bytes:
    buffer = io.BytesIO()
    nets = {
        name: torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)).half()
        for name in ("layers.0.weight", "layers.1.weight")
    }
    torch.save(nets, buffer)
    return buffer.getvalue()
