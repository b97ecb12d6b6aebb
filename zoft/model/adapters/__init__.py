"""Parameter-efficient tuning through `peft`: LoRA and prefixes around a frozen base.

What is wrapped, how it starts, how it is saved and read. The rest of zoft sees a model whose trainable blocks are the
adapters' tensors, in float32 whatever the dtype of the base. Where they start from is a function of the base and the
seed, so that resuming and replaying find it again; no global generator is left changed.
"""

from zoft.model.adapters.files import base_of, is_adapter, read, save
from zoft.model.adapters.settings import MODES, Adapter, LoRA, LoRASetting, Prefix, PrefixSetting, chosen
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
    "chosen",
    "is_adapter",
    "mode_of",
    "read",
    "save",
    "virtual_tokens",
]
