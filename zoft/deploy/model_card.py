"""The model card of a fine-tuned checkpoint: where it came from, and how to make it again."""

from huggingface_hub import ModelCardData

from zoft.deploy.config import FinetuneConfig
from zoft.deploy.journal import HeaderLine
from zoft.model.adapters import Adapter, LoRA, adapter_of
from zoft.model.load import Loaded
from zoft.optim import get_method

_AGAIN = """
The run's journal and the base model give these weights again, without data: `zoft replay BASE RUN --out DIR`.
"""


def model_card(loaded: Loaded, config: FinetuneConfig, header: HeaderLine, kept: int) -> str:
    """Return the README.md of the checkpoint, or adapter, that holds step ``kept`` of a run on ``loaded``.

    The front matter declares the lineage (``base_model``), from which a tuner card is found for a derivative.
    """
    method, adapter = header.method, adapter_of(loaded.model)
    base = header.base if adapter is None or config.adapter is not None else loaded.base
    gradients = get_method(method).first_order
    tags = ["zoft", "first-order" if gradients else "zeroth-order", method]
    data = ModelCardData(
        library_name="transformers" if adapter is None else "peft",
        base_model=base,
        base_model_relation="finetune" if adapter is None else "adapter",
        tags=tags if adapter is None else [*tags, adapter.mode],
    )
    how = "with gradients" if gradients else "with forward passes only"
    again = "" if gradients else _AGAIN
    trained = "" if adapter is None else f"| trained | {_described(adapter)} |\n"
    tuner = f"| tuner card | `{header.tuner.digest}` |\n" if header.tuner else ""
    task = config.task or (config.data.name if config.data else "")
    return f"""---
{data.to_yaml()}
---

# {base} fine-tuned on {task}

Fine-tuned {how} by zoft {header.versions["zoft"]}, method `{method}`.

| setting | value |
| --- | --- |
| base model | `{base}` |
| base hash | `{header.base_hash}` |
{trained}| task | {task} |
| objective | {config.objective} |
| kept step | {kept} of {config.steps} |
| batch size, probes | {config.batch_size}, {config.q} |
| learning rate, eps | {header.lr:g} ({config.schedule}), {header.eps:g} |
{tuner}| weights trained in | {header.dtype if adapter is None else f"float32, the base in {header.dtype}"} |
| seed | {config.seed} |
{again}"""


def _described(adapter: Adapter) -> str:
    if isinstance(adapter, LoRA):
        return f"LoRA, rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets or ())}"
    return f"prefixes of {adapter.tokens} tokens"
