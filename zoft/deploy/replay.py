"""Replay: rebuild fine-tuned weights from the base and a journal, without data or forward passes."""

import time
from pathlib import Path

from pydantic import ValidationError

from zoft.deploy.config import FinetuneConfig
from zoft.deploy.header import check_base, check_start, start_hash
from zoft.deploy.journal import Contents, HeaderLine, read_journal
from zoft.deploy.model_card import model_card
from zoft.deploy.result import ReplayResult
from zoft.deploy.setup import exact_parts
from zoft.deploy.snapshots import weights_sha256
from zoft.errors import RunError, shown
from zoft.events import Listener, Progress, Warned, silent
from zoft.model import fingerprint
from zoft.model.load import DtypeName, Loaded, load, save
from zoft.model.offload import DeviceMap
from zoft.optim import get_method
from zoft.threads import threads

_DTYPE_NAMES: dict[str, DtypeName] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def replay(
    base: str,
    run: Path,
    out: Path,
    *,
    step: int | None = None,
    device: str = "auto",
    device_map: DeviceMap | None = None,
    on_event: Listener = silent,
) -> ReplayResult:
    """Write to ``out`` the weights of a run after ``step`` steps (default: the kept step).

    Args:
        base: the model that the run started from, checked by its hash.
        run: a run folder, or its journal.
        out: a new folder, in Hugging Face layout.
        device, device_map: where the weights are during the replay, see `zoft.load`; the bits are the same on each.

    Raises:
        RunError: another base, a damaged journal, a step that the run never reached, or weights without the SHA-256
            that the run recorded. On another kind of device than the run's a different SHA-256 is only a warning, since
            the last digits of matrix products depend on the device.
    """
    begin = time.perf_counter()
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out")
    journal = run / "journal" if run.is_dir() else run
    contents = read_journal(journal)
    header = contents.header
    if header is None:
        raise RunError(f"{journal} holds no run: its header is missing")
    target = _target_step(contents, journal, step)
    method = get_method(header.method)
    if method.first_order:
        raise RunError(
            f"{journal} is of a run of {method.name}, whose gradients are not in the journal; its weights are "
            f"in {journal.parent / 'model'}, if the run kept them"
        )
    config = _config(header, journal)
    loaded = load(
        base,
        dtype=_DTYPE_NAMES[header.dtype],
        device=device,
        fp32_vectors=True,
        device_map=device_map,
        adapter=config.adapter,
        seed=config.seed,
        bound_kernels=True,
    )
    _check(base, loaded, header, on_event)
    optimizer = method.optimizer(
        loaded.model,
        lr=header.lr,
        eps=header.eps,
        probes=config.q,
        weight_decay=config.weight_decay,
        seed=config.seed,
        master_weights=config.master_weights,
        **method.make_parts(config.options, steps=config.steps),
        **exact_parts(config, loaded.model, header.exact_rows),
    )
    if optimizer.needs_gradient:
        raise RunError(
            f"{journal} is of a run whose head moved along gradients that are too large for a journal; a replay has no "
            f"data to measure them on again. Its weights are in {journal.parent / 'model'}, if the run kept them"
        )
    with threads(header.threads):  # the bits of matrix products, which some methods use, depend on it
        for record in contents.records(0, target):
            optimizer.apply(record)
            on_event(Progress("replaying", record.step + 1, target))
    sha256 = weights_sha256(optimizer.blocks)
    verified = _agrees(sha256, target, contents, loaded.model.device.type, on_event)
    card = model_card(loaded, config, header, target)
    save(loaded.model, loaded.tokenizer, out, dtype=loaded.stored_dtype, card=card)
    seconds = time.perf_counter() - begin
    return ReplayResult(
        model=base, journal=journal, step=target, sha256=sha256, verified=verified, out=out, seconds=seconds
    )


def _agrees(sha256: str, step: int, contents: Contents, device: str, on_event: Listener) -> bool:
    """Whether the run recorded ``sha256`` for ``step``; `RunError` if it recorded another on this kind of device."""
    header, end = contents.header, contents.end
    if header is None or end is None or end.kept != step:
        return False
    if end.sha256 == sha256:
        return True
    found = (
        f"the replayed weights of step {step} have SHA-256 {sha256[:16]}, the run recorded {end.sha256[:16]}; "
        f"it was made on {header.device} with {header.versions}"
    )
    if header.device == device:
        raise RunError(found)
    on_event(Warned(f"{found}: they differ in the last digits, or altogether; check on {header.device}"))
    return False


def _config(header: HeaderLine, journal: Path) -> FinetuneConfig:
    if header.dtype not in _DTYPE_NAMES:
        raise RunError(f"{journal} is of a run in {shown(header.dtype)}; expected {', '.join(_DTYPE_NAMES)}")
    try:
        return FinetuneConfig.model_validate(header.config)
    except ValidationError as error:
        first = error.errors()[0]
        what = shown(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}", 200)
        raise RunError(f"{journal}: the run's configuration cannot be used ({what})") from error


def _target_step(contents: Contents, journal: Path, step: int | None) -> int:
    if step is None:
        if contents.end is not None:
            return contents.end.kept
        raise RunError(
            f"{journal} is of a run that has not finished ({len(contents.steps)} steps); "
            "finish it with `zoft finetune --resume`, or name a --step"
        )
    if not 0 <= step <= len(contents.steps):
        raise RunError(f"{journal} has {len(contents.steps)} steps; --step {step} is not among them")
    return step


def _check(base: str, loaded: Loaded, header: HeaderLine, on_event: Listener) -> None:
    check_base(header, base, fingerprint.base_hash(loaded.path))
    check_start(header, start_hash(loaded), base)
    if header.device != loaded.model.device.type:
        on_event(
            Warned(
                f"the run was made on {header.device}, this is {loaded.model.device.type}: "
                "the last digits of the weights may differ"
            )
        )
