"""Encoded splits of a task, from its name or a user's file; every row is checked before training starts."""

import datetime
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from zoft.errors import ConfigError, DataError
from zoft.tasks.builtin import get_task
from zoft.tasks.chat import ChatTemplate, TemplateError, check_template
from zoft.tasks.cloze import GAP, ClozeEncoder, cloze_task, own_cloze_task, refuse_gaps
from zoft.tasks.demonstrations import with_demonstrations
from zoft.tasks.encode import Encoder
from zoft.tasks.hub_data import hub_pool, hub_rows
from zoft.tasks.own_task import ignored, own_task
from zoft.tasks.rows import Located, Sizes, folder_rows, own_rows
from zoft.tasks.shots import draw, shuffled
from zoft.tasks.types import Encoded, Prepared, Split, Task

DEV_SIZE = 500
_EVERY = sys.maxsize - 1


def prepare(
    task: str | None,
    data: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int,
    splits: Sequence[Split] = ("train", "dev", "test"),
    train_size: int = 1000,
    dev_size: int | None = None,
    test_size: int = 1000,
    seed: int = 0,
    shots: int | None = None,
    demonstrations: int = 0,
    masked: bool = False,
    date: datetime.date | None = None,
    vocabulary: int = sys.maxsize,
) -> Prepared:
    """Return the encoded splits of a built-in task, or of the user's own data where ``task`` is None.

    A built-in task's rows come from ``data/<task>/<split>.jsonl``, or without ``data`` from the Hub. The first of
    ``splits`` is required; another that is absent is empty. ``dev_size`` defaults to the task's own (500, or 100).
    ``shots`` is the number of train rows, and of dev rows, per class, both drawn by ``seed`` from the training split;
    ``demonstrations`` is the number of solved training rows, drawn by ``seed``, before every prompt. ``masked`` selects
    the rows of a masked language model; `ConfigError` if the task has no cloze prompt. ``date`` is given to the chat
    template, if that asks for one (default: today). ``vocabulary`` is the number of token ids that the model knows
    (`zoft.model.architecture.vocabulary`).

    Every row is read, checked and encoded here; a bad one, or one with another token id, raises `DataError` with file,
    line and field. Conversations that the chat template cannot render are left out, with a warning that counts them;
    `DataError` if none of a split is left.
    """
    builtin = get_task(task) if task is not None else None
    if builtin is not None and masked:
        builtin = cloze_task(builtin)
    if builtin is None and data is None:
        raise ConfigError("neither task nor data: name a built-in task or give your own data")
    default_dev = builtin.dev_size if builtin else DEV_SIZE
    sizes: dict[Split, int] = {
        "train": train_size,
        "dev": default_dev if dev_size is None else dev_size,
        "test": test_size,
    }
    read = (*splits, *(("train",) if demonstrations and "train" not in splits else ()))
    if shots:
        sizes |= {"train": _EVERY, "dev": _EVERY}
        read = tuple(dict.fromkeys("train" if split == "dev" else split for split in read))
    template = ChatTemplate(tokenizer, date)
    pool: Iterable[Located] = ()
    if builtin is None:
        assert data is not None
        rows = own_rows(data, read, {split: size + 1 for split, size in sizes.items()})
        resolved = _own_task(data, next(iter(rows.values())), tokenizer, template, masked)
    else:
        resolved = builtin
        if data:
            rows = folder_rows(builtin, data, read, sizes)
        elif shots:
            rows, pool = hub_rows(builtin, [s for s in read if s != "train"], sizes, seed), hub_pool(builtin, seed)
        else:
            rows = hub_rows(builtin, read, sizes, seed)
    warnings: list[str] = []
    if builtin is None and (unread := ignored(next(iter(rows.values()))[0])):
        warnings.append(f"the rows have more fields than one kind of row needs; not read: {', '.join(unread)}")
    if shots and "train" in read:
        drawn, few = draw(resolved, pool or shuffled(rows["train"], seed), shots)
        warnings += few
        rows |= drawn
    if demonstrations:
        resolved = with_demonstrations(resolved, rows.get("train", [])[:train_size], demonstrations, seed)
    rows = {split: rows[split] for split in splits if split in rows}
    encoder = (ClozeEncoder if masked else Encoder)(tokenizer, resolved, context_length)
    prepared = _encoded(resolved, rows, sizes, encoder, warnings, TokenCheck(tokenizer, vocabulary))
    return replace(prepared, date=template.date) if template.dated else prepared


class TokenCheck:
    """Check that a model of ``vocabulary`` token ids can read and predict the tokens of a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def __call__(self, one: Encoded) -> None:
        """Raise `DataError` for the first token that is not in the vocabulary."""
        targets = (token for row in one.rows for target in row.targets for token in target.tokens)
        tokens = (token for row in one.rows for token in row.ids)
        unknown = next((token for token in (*tokens, *targets, *one.prompt_ids) if token >= self._vocabulary), None)
        if unknown is not None:
            raise DataError(
                f"the token {self._tokenizer.convert_ids_to_tokens(unknown)!r} has id {unknown}, and the model knows "
                f"{self._vocabulary} (0 to {self._vocabulary - 1}): the tokenizer got tokens that the model never did; "
                "use the model's own tokenizer, or rows without this token"
            )


def _own_task(
    data: Path, rows: Sequence[Located], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, masked: bool
) -> Task:
    task = own_task(data, rows, template, tokenizer.eos_token or "")
    if masked:
        return own_cloze_task(task, tokenizer.mask_token or GAP)
    if task.target == "messages":
        check_template(tokenizer)
    return refuse_gaps(task) if task.kind == "classification" else task


def _encoded(
    task: Task,
    rows: dict[Split, list[Located]],
    sizes: Sizes,
    encoder: Encoder | ClozeEncoder,
    warnings: list[str],
    check: TokenCheck,
) -> Prepared:
    done: dict[Split, tuple[Encoded, ...]] = {}
    for split, located in rows.items():
        if len(located) > sizes[split]:  # own data is read one row further, to warn of unused rows
            located = located[: sizes[split]]
            warnings.append(f"only the first {len(located)} {split} rows are used; raise {split}_size for more")
        before = encoder.truncated
        done[split], refused = _encode_all(task, encoder, located, check)
        if refused:
            if not done[split]:
                raise refused[0]
            warnings.append(f"{len(refused)} of {len(located)} {split} rows are left out (the first: {refused[0]})")
        if cut := encoder.truncated - before:
            warnings.append(
                f"{cut} of {len(located)} {split} rows are longer than {encoder.context_length} tokens: truncated"
            )
    for token, count in encoder.doubled.items():
        warnings.append(f"{count} rows bring the token {token!r}, which is added to every row: it is written once")
    return Prepared(task, done.get("train", ()), done.get("dev", ()), done.get("test", ()), tuple(warnings))


def _encode_all(
    task: Task, encoder: Encoder | ClozeEncoder, rows: Sequence[Located], check: TokenCheck
) -> tuple[tuple[Encoded, ...], list[TemplateError]]:
    """Return the encoded rows, and the errors of those that the chat template cannot render."""
    done: list[Encoded] = []
    refused: list[TemplateError] = []
    for row in rows:
        try:
            encoded = encoder.encode(task.example(row.row))
            check(encoded)
            done.append(encoded)
        except DataError as error:
            placed = type(error)(f"{row.place}: {error}")
            if not isinstance(placed, TemplateError):
                raise placed from error
            refused.append(placed)
    return tuple(done), refused
