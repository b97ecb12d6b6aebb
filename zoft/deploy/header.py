"""The header of a journal: made when a run begins, checked when it is resumed or replayed."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable

import torch

import zoft
from zoft.deploy.config import FinetuneConfig
from zoft.deploy.journal import FORMAT, HeaderLine, TunerUsed
from zoft.deploy.journal_lines import PLAIN_FORMAT
from zoft.deploy.snapshots import weights_sha256
from zoft.errors import RunError
from zoft.model import fingerprint
from zoft.model.load import Loaded
from zoft.noise.table import NOISE_VERSION
from zoft.tasks import Encoded, Prepared
from zoft.tasks.types import Row
from zoft.weights.blocks import Block

_PACKAGES = ("torch", "transformers", "numpy")


def make_header(
    config: FinetuneConfig,
    loaded: Loaded,
    prepared: Prepared,
    *,
    lr: float,
    eps: float,
    tuner: TunerUsed | None,
    exact_rows: tuple[int, ...] | None = None,
) -> HeaderLine:
    """Return the header of a run of ``config`` on ``loaded``."""
    versions = {"zoft": zoft.__version__, "python": platform.python_version()}
    return HeaderLine(
        format=PLAIN_FORMAT if config.exact == "none" else FORMAT,
        base=config.model,
        base_hash=fingerprint.base_hash(loaded.path),
        data_hash=data_hash(prepared),
        config=config.model_dump(mode="json"),
        lr=lr,
        eps=eps,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=loaded.model.device.type,
        threads=torch.get_num_threads(),
        noise=NOISE_VERSION,
        versions=versions | {name: importlib.metadata.version(name) for name in _PACKAGES},
        tuner=tuner,
        start=start_hash(loaded),
        exact_rows=exact_rows,
    )


def start_hash(loaded: Loaded) -> str | None:
    """Return the SHA-256 of the weights that an adapter was loaded with; None for a model without one."""
    if loaded.start is None:
        return None
    return weights_sha256([Block(name, torch.nn.Parameter(value)) for name, value in loaded.start.items()])


def data_hash(prepared: Prepared) -> str:
    """Return the SHA-256 over the encoded train and dev rows, which decide every step and which one is kept.

    Hashed is the text of `_text_of` for each row, and ``end of split`` after each split.
    """
    digest = hashlib.sha256()
    for split in (prepared.train, prepared.dev):
        for one in split:
            digest.update(_text_of(one).encode())
        digest.update(b"end of split")
    return digest.hexdigest()


def _text_of(one: Encoded) -> str:
    """A row as text: its fields in a fixed form, in which no field may be added, renamed or moved.

    Journals hold hashes of it. It is how Python shows the data classes of zoft 0.1; an example's suffix is left out,
    since its tokens are in the rows.
    """
    shown = one.example
    example = (
        f"Example(prompt={shown.prompt!r}, choices={shown.choices!r}, label={shown.label!r}, "
        f"answers={shown.answers!r}, also_right={shown.also_right!r}, spans={shown.spans!r})"
    )
    rows, loss_rows = _tuple(map(_row, one.rows)), _tuple(map(_row, one.loss_rows))
    return f"Encoded(example={example}, rows={rows}, loss_rows={loss_rows}, prompt_ids={one.prompt_ids!r})"


def _row(row: Row) -> str:
    targets = _tuple(
        f"Target(choice={one.choice!r}, positions={one.positions!r}, tokens={one.tokens!r})" for one in row.targets
    )
    return f"Row(ids={row.ids!r}, targets={targets})"


def _tuple(parts: Iterable[str]) -> str:
    """A tuple as Python shows it.

    >>> _tuple(["a"]), _tuple(["a", "b"])
    ('(a,)', '(a, b)')
    """
    joined = ", ".join(items := list(parts))
    return f"({joined},)" if len(items) == 1 else f"({joined})"


def check_start(stored: HeaderLine, now: str | None, base: str) -> None:
    """Raise `RunError` unless the adapter starts from the weights it had when the run began."""
    if stored.start == now:
        return
    if stored.start is None or now is None:
        what = ("an adapter", "none") if now is None else ("no adapter", "one")
        raise RunError(f"the run began with {what[0]}, and {base} has {what[1]}; name the model that it began with")
    raise RunError(
        f"the adapter starts from other weights than the run did (SHA-256 {now[:16]}, then {stored.start[:16]}): "
        f"{base} is another adapter, or the activations that a prefix starts from are different on this machine "
        f"(it was {stored.device}, {stored.versions})"
    )


def check_base(stored: HeaderLine, base: str, base_hash: str) -> None:
    """Raise `RunError` unless ``base`` is the model that the run began with and the noise version is the same."""
    if stored.base_hash != base_hash:
        raise RunError(
            f"{base} is not the base of this run, or has changed since: its hash is {base_hash[:16]}, the run began "
            f"with {stored.base_hash[:16]} ({stored.base}); name the model it began with"
        )
    if stored.noise != NOISE_VERSION:
        raise RunError(
            f"this run has noise version {stored.noise!r}, this zoft draws {NOISE_VERSION!r}, other numbers for the "
            f"same seed: use the version of zoft that wrote it ({stored.versions.get('zoft', 'unknown')})"
        )


def check_header(stored: HeaderLine, now: HeaderLine) -> list[str]:
    """Return warnings of differences to when the run began; raise `RunError` if it cannot be resumed."""
    check_base(stored, now.base, now.base_hash)
    check_start(stored, now.start, now.base)
    if stored.data_hash not in (None, now.data_hash):
        raise RunError("the train or dev rows have changed since this run began; resume with the data it began with")
    unknown = ["the journal does not record the data that the run began with: check that --data is the same"]
    pairs = (("device", stored.device, now.device), ("versions", stored.versions, now.versions))
    return (unknown if stored.data_hash is None else []) + [
        f"{what}: {before} when the run began, now {here}: the result may differ from that of an uninterrupted run"
        for what, before, here in pairs
        if before != here
    ]
