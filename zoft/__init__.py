"""zoft: learned zeroth-order fine-tuning of large language models, with forward passes only."""

from typing import Any

__version__ = "0.1.0"

_LAZY = {"load": "zoft.model.load"}  # what is heavy to import, and is imported when it is first asked for


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zoft' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
