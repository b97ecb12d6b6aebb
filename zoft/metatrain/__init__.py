"""Stage one: learn a tuner by backpropagating the loss after a zeroth-order step."""

from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.job import stored_config
from zoft.metatrain.result import MetatrainResult
from zoft.metatrain.train import metatrain
from zoft.metatrain.trials import best_trials

__all__ = ["MetatrainConfig", "MetatrainResult", "best_trials", "metatrain", "stored_config"]
