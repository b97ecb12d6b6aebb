"""Stage one: learning a tuner by backpropagating the loss after a zeroth-order step."""

from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.result import MetatrainResult
from zoft.metatrain.train import metatrain

__all__ = ["MetatrainConfig", "MetatrainResult", "metatrain"]
