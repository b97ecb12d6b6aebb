"""Run a module's forward pass inside a context manager, for every caller."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

Context = Callable[[torch.nn.Module], AbstractContextManager[Any]]


def run_within(module: torch.nn.Module, mark: type, context: Context) -> None:
    """Run every forward pass of ``module`` in the context that ``context(module)`` returns.

    Its class is replaced by a subclass of the same name with ``mark`` as a further base: ``state_dict``, copies and
    saving work as before. A module that has the mark already is not changed.
    """
    if not isinstance(module, mark):
        cls: Any = type(module)
        module.__class__ = _running_within(cls, mark, context)


@functools.cache
def _running_within(cls: Any, mark: type, context: Context) -> Any:
    forward = cls.forward

    @functools.wraps(forward)
    def within(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        with context(self):
            return forward(self, *args, **kwargs)

    members = {"forward": within, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (mark, cls), members)
