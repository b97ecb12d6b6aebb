"""Prefixes: keys and values of virtual tokens that every layer attends to (prefix tuning, arXiv 2101.00190).

`peft` keeps the prefixes of all layers in one matrix. `LayerPrefixes` replaces it by one block for the keys and one for
the values of every layer, so that a tuner, LeZO or a displacement can treat layers separately; peft reads, uses and
saves it as that matrix.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from zoft.errors import ModelError
from zoft.model.adapters.library import NAME, architecture_name, import_peft, task_type, wrap
from zoft.model.adapters.settings import Prefix
from zoft.threads import threads
from zoft.weights.streamed import devices_of

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def with_prefix(model: Any, adapter: Prefix, seed: int, special: Collection[int]) -> Any:
    """Return ``model`` wrapped with prefixes: the activations of tokens drawn by ``seed``, none of them ``special``."""
    if task_type(model) is None:
        raise ModelError(
            f"--prefix needs a causal language model; a bidirectional {architecture_name(model)} model takes no "
            "keys and values from before its text: try --lora"
        )
    tokens = draw_tokens(adapter.tokens, model.config.get_text_config().vocab_size, special, seed)
    with threads(1):  # so that the prefixes do not depend on the number of threads
        layers = activations(model, tokens)
    heads, _, width = layers[0][0].shape
    config = import_peft().PrefixTuningConfig(
        task_type=task_type(model),
        num_virtual_tokens=adapter.tokens,
        num_layers=len(layers),
        num_attention_heads=heads,
        token_dim=heads * width,
    )
    return wrap_with_prefix(model, config, as_matrix(layers))


def wrap_with_prefix(model: Any, config: Any, matrix: torch.Tensor) -> Any:
    """Return ``model`` wrapped with the prefixes in ``matrix``, as peft saves them."""
    devices = devices_of(model)
    home = devices[0] if len(devices) == 1 else torch.device("cpu")  # several devices copy their parts from there
    wrapped = wrap(model, config)
    wrapped.prompt_encoder[NAME] = LayerPrefixes(matrix.to(home, torch.float32), config.num_layers)
    return wrapped


class _LayerPrefix(torch.nn.Module):
    """The prefix of one layer, keys and values ``(tokens, heads * width)``."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = torch.nn.Parameter(keys), torch.nn.Parameter(values)


class LayerPrefixes(torch.nn.Module):
    """The prefixes of all layers, a replacement for `peft.PrefixEncoder`.

    Args:
        matrix: ``(tokens, layers * 2 * heads * width)``: keys, then values, layer by layer.
        layers: their number.
    """

    def __init__(self, matrix: torch.Tensor, layers: int) -> None:
        super().__init__()
        parts = [part.clone() for part in matrix.chunk(2 * layers, dim=1)]
        self.layers = torch.nn.ModuleList(map(_LayerPrefix, parts[::2], parts[1::2]))

    @property
    def weight(self) -> torch.Tensor:
        """All prefixes as one matrix, as peft expects."""
        return torch.cat(list(self.layers.parameters()), dim=1)

    @property
    def embedding(self) -> "LayerPrefixes":
        """This module: peft reads ``embedding.weight``."""
        return self

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the prefixes of ``len(tokens)`` rows, ``(rows, tokens, layers * 2 * heads * width)``."""
        return self.weight.expand(len(tokens), -1, -1)


def draw_tokens(count: int, vocabulary: int, special: Collection[int], seed: int) -> list[int]:
    """Return ``count`` token ids, none of them ``special``, drawn by ``seed``.

    >>> tokens = draw_tokens(5, 100, special={0, 1}, seed=0)
    >>> len(set(tokens)), min(tokens) > 1
    (5, True)
    """
    order = np.random.Generator(np.random.Philox(key=[seed, 3])).permutation(vocabulary).tolist()
    ordinary = [token for token in order if token not in special]
    if len(ordinary) < count:
        raise ModelError(f"prefix.tokens is {count}, more than the {len(ordinary)} tokens of the vocabulary")
    return ordinary[:count]


@torch.no_grad()
def activations(model: Any, tokens: Sequence[int]) -> list[KeysAndValues]:
    """Return the keys and values of ``tokens`` in every layer of ``model``, ``(heads, tokens, width)`` each.

    Raises:
        ModelError: the model has no cache of keys and values, or their shapes differ between layers.
    """
    row = torch.tensor([list(tokens)], device=model.device)
    output = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None) or []
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    found = [(keys[0], values[0]) for keys, values in pairs if keys is not None and values is not None]
    shapes = {tuple(tensor.shape) for pair in found for tensor in pair}
    if len(found) != len(pairs) or len(shapes) != 1 or shapes.pop()[1] != len(tokens):
        raise ModelError(
            "--prefix needs a model with keys and values of one shape for every token in every layer, and this "
            f"{architecture_name(model)} model has none: try --lora"
        )
    return found


def as_matrix(layers: Sequence[KeysAndValues]) -> torch.Tensor:
    """Return keys and values of all layers as the matrix of `LayerPrefixes`, float32 on the device of the first."""
    parts = [tensor.transpose(0, 1).flatten(1) for pair in layers for tensor in pair]
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1).float()
