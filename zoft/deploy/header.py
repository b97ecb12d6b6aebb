"""The header of a journal: made when a run begins, checked when it goes on."""

import hashlib
import importlib.metadata
import platform

import torch

import zoft
from zoft.deploy.config import FinetuneConfig
from zoft.deploy.journal import HeaderLine, TunerUsed
from zoft.deploy.snapshots import weights_sha256
from zoft.errors import RunError
from zoft.model import fingerprint
from zoft.model.load import Loaded
from zoft.noise.table import NOISE_VERSION
from zoft.tasks import Prepared
from zoft.weights.blocks import Block

_PACKAGES = ("torch", "transformers", "numpy")


def make_header(
    config: FinetuneConfig, loaded: Loaded, prepared: Prepared, *, lr: float, eps: float, tuner: TunerUsed | None
) -> HeaderLine:
    """Return what a run of ``config`` on ``loaded`` starts from."""
    versions = {"zoft": zoft.__version__, "python": platform.python_version()}
    return HeaderLine(
        base=config.model,
        base_hash=fingerprint.base_hash(loaded.path),
        data_hash=_data_hash(prepared),
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
    )


def start_hash(loaded: Loaded) -> str | None:
    """Return the SHA-256 of the weights that an adapter was loaded with; None for a model without one."""
    if loaded.start is None:
        return None
    return weights_sha256([Block(name, torch.nn.Parameter(value)) for name, value in loaded.start.items()])


def _data_hash(prepared: Prepared) -> str:
    """SHA-256 over the train and dev rows as they were encoded; these decide every step and which one is kept."""
    digest = hashlib.sha256()
    for split in (prepared.train, prepared.dev):
        for one in split:
            digest.update(repr(one).encode())
        digest.update(b"end of split")
    return digest.hexdigest()


def check_start(stored: HeaderLine, now: str | None, base: str) -> None:
    """Raise `RunError` unless the adapter is as it was when the run began."""
    if stored.start == now:
        return
    if stored.start is None or now is None:
        what = ("an adapter", "none") if now is None else ("no adapter", "one")
        raise RunError(f"the run began with {what[0]}, and {base} has {what[1]}; name the model that it began with")
    raise RunError(
        f"the adapter starts from other weights than the run did (SHA-256 {now[:16]}, then {stored.start[:16]}): "
        f"{base} is another adapter, or the activations that a prefix starts from come out differently on this machine "
        f"(it was {stored.device}, {stored.versions})"
    )


def check_base(stored: HeaderLine, base: str, base_hash: str) -> None:
    """Raise `RunError` unless ``base`` is the model that the run began with and the noise is still the same."""
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
    """Return warnings of what is different from when the run began; raise `RunError` if it cannot go on."""
    check_base(stored, now.base, now.base_hash)
    check_start(stored, now.start, now.base)
    if stored.data_hash not in (None, now.data_hash):
        raise RunError("the train or dev rows have changed since this run began; resume with the data it began with")
    untold = ["the journal does not say what data the run began with: check that --data is the same"]
    pairs = (("device", stored.device, now.device), ("versions", stored.versions, now.versions))
    return (untold if stored.data_hash is None else []) + [
        f"{what} were {before}, are {here}: the result may differ from an unbroken run"
        for what, before, here in pairs
        if before != here
    ]
