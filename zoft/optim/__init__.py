"""Zeroth-order optimizers with the torch.optim interface; they know no files and no Hub."""

from zoft.optim.engine import ZOOptimizer
from zoft.optim.methods import METHODS, Method, get_method
from zoft.optim.mezo import MeZO
from zoft.optim.record import StepRecord
from zoft.optim.tuner import ZOFineTuner

__all__ = ["METHODS", "MeZO", "Method", "StepRecord", "ZOFineTuner", "ZOOptimizer", "get_method"]
