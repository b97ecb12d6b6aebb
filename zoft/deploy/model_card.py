"""The model card of a fine-tuned checkpoint: its base, its settings, and how to reproduce it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from zoft.deploy.config import FinetuneConfig
from zoft.deploy.journal import HeaderLine
from zoft.model.adapters import Adapter, LoRA, adapter_of
from zoft.model.load import Loaded
from zoft.optim import get_method

_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def model_card(loaded: Loaded, config: FinetuneConfig, header: HeaderLine, kept: int) -> str:
    """Return the README.md of the checkpoint, or adapter, that holds step ``kept`` of a run on ``loaded``.

    The front matter declares the lineage (``base_model``), by which a tuner card is found for a derivative.
    """
    adapter, gradients = adapter_of(loaded.model), get_method(header.method).first_order
    tags = ["zoft", "first-order" if gradients else "zeroth-order", header.method]
    data = ModelCardData(
        library_name="transformers" if adapter is None else "peft",
        base_model=header.base if adapter is None or config.adapter is not None else loaded.base,
        base_model_relation="finetune" if adapter is None else "adapter",
        tags=tags if adapter is None else [*tags, adapter.mode],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        config=config,
        header=header,
        kept=kept,
        gradients=gradients,
        task=config.task or (config.data.name if config.data else ""),
        trained="" if adapter is None else _described(adapter),
    )
    return str(card)


def _described(adapter: Adapter) -> str:
    if isinstance(adapter, LoRA):
        return f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets or ())}"
    return f"prefixes of {adapter.tokens} tokens"
