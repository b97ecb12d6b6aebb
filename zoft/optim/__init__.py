"""Zeroth-order optimizers with the torch.optim interface, and first-order bounds; they know no files and no Hub."""

from zoft.optim.engine import ZOOptimizer
from zoft.optim.first_order import SGD, Adam
from zoft.optim.methods import METHODS, Method, get_method
from zoft.optim.mezo import MeZO
from zoft.optim.record import StepRecord
from zoft.optim.tuner import ZOFineTuner

__all__ = ["METHODS", "SGD", "Adam", "MeZO", "Method", "StepRecord", "ZOFineTuner", "ZOOptimizer", "get_method"]
