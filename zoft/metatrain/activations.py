"""Activation checkpointing: recompute activations in the backward pass instead of storing them (arXiv 1604.06174)."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from zoft.errors import ModelError
from zoft.model.adapters import virtual_tokens
from zoft.weights.streamed import devices_of, streaming


def checkpoint_activations(
    model: torch.nn.Module, recomputing: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Make the layers of ``model`` store only their inputs for a backward pass; gradients stay the same to the bit.

    transformers does so only in training mode, where dropout is on; here the mode does not matter. ``recomputing``
    returns the context in which a half-precision layer is recomputed: on a GPU the backward pass runs in another
    thread, where the contexts around it are not active.

    Raises:
        ModelError: the model has no layers that can be checkpointed.
    """
    if virtual_tokens(model):
        raise ModelError("checkpointed layers would append a prefix twice; leave out checkpoint_activations")
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that can recompute their activations; leave out "
            "checkpoint_activations"
        )
    for layer in layers:
        layer.forward = _recomputed(layer.forward, lambda: _Recomputation(model, recomputing))


class _Recomputation(AbstractContextManager[None]):
    """Context in which a layer is recomputed; entered once for each backward pass through it."""

    def __init__(self, model: torch.nn.Module, in_half: Callable[[], AbstractContextManager[Any]]) -> None:
        self._model, self._in_half = model, in_half

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(streaming(self._model, again=True))
            if torch.is_autocast_enabled(devices_of(self._model)[0].type):  # torch has restored it
                stack.enter_context(self._in_half())
            self._entered = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


def _recomputed(
    forward: Callable[..., Any], recomputing: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), recomputing()),
            **kwargs,
        )

    return run
