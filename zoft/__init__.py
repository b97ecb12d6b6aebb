"""zoft: learned zeroth-order fine-tuning of large language models, with forward passes only."""

__version__ = "0.1.0"
