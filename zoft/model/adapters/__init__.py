"""Parameter-efficient tuning through `peft`: LoRA and prefixes around a frozen base.

Wrapping, initialising, saving and reading adapters. The rest of zoft sees a model whose trainable blocks are the
adapters' tensors, in float32 for any dtype of the base. Their initial values are a function of the base and the seed,
so that resuming and replaying reproduce them; no global generator is changed.
"""

from zoft.model.adapters.files import base_of, is_adapter, read, save
from zoft.model.adapters.settings import MODES, Adapter, LoRA, LoRASetting, Prefix, PrefixSetting, single_adapter
from zoft.model.adapters.wrapped import adapter_of, attach, mode_of, virtual_tokens
from zoft.weights.blocks import Mode

__all__ = [
    "MODES",
    "Adapter",
    "LoRA",
    "LoRASetting",
    "Mode",
    "Prefix",
    "PrefixSetting",
    "adapter_of",
    "attach",
    "base_of",
    "is_adapter",
    "mode_of",
    "read",
    "save",
    "single_adapter",
    "virtual_tokens",
]
