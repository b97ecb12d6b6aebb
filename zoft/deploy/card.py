"""The model card of a fine-tuned checkpoint: where it came from, and how to make it again."""

from huggingface_hub import ModelCardData

from zoft.deploy.config import FinetuneConfig
from zoft.deploy.journal import HeaderLine
from zoft.optim import get_method

_AGAIN = """
The run's journal and the base model give these weights again, without data: `zoft replay BASE RUN --out DIR`.
"""


def model_card(base: str, config: FinetuneConfig, header: HeaderLine, kept: int) -> str:
    """Return the README.md of the checkpoint that holds step ``kept`` of a run on ``base``.

    The front matter declares the lineage (``base_model``), from which a tuner card is found for a derivative.
    """
    method = header.method
    gradients = get_method(method).first_order
    data = ModelCardData(
        library_name="transformers",
        base_model=base,
        base_model_relation="finetune",
        tags=["zoft", "first-order" if gradients else "zeroth-order", method],
    )
    how = "with gradients" if gradients else "with forward passes only"
    again = "" if gradients else _AGAIN
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
| task | {task} |
| objective | {config.objective} |
| kept step | {kept} of {config.steps} |
| batch size, probes | {config.batch_size}, {config.q} |
| learning rate, eps | {header.lr:g} ({config.schedule}), {header.eps:g} |
{tuner}| weights trained in | {header.dtype} |
| seed | {config.seed} |
{again}"""
