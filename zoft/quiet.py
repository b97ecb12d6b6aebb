"""Silence progress bars, load reports and notices of libraries."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from logging import ERROR, getLogger

from transformers.utils import logging


def quiet_bitsandbytes() -> AbstractContextManager[None]:
    """Silence notices of bitsandbytes on import (also by `peft`) about kernels that zoft does not use."""
    return _errors_only("bitsandbytes")


@contextmanager
def _errors_only(library: str) -> Iterator[None]:
    logger = getLogger(library)
    before = logger.level
    logger.setLevel(ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and warnings of transformers and accelerate; zoft raises errors for them."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with _errors_only("accelerate"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
