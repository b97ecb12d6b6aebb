"""Zeroth-order optimizers with the torch.optim interface; they know no files and no Hub."""

from zoft.optim.adam import Adam, ScalarAdam
from zoft.optim.conservative import Conservative
from zoft.optim.dizo import DiZO, FirstOrderDiZO
from zoft.optim.engine import ZOOptimizer
from zoft.optim.lezo import Layers
from zoft.optim.look import Whole
from zoft.optim.lowrank import LOZO, SubZero, TeZO
from zoft.optim.lozo_m import LOZOMomentum
from zoft.optim.methods import METHODS, Method, get_method
from zoft.optim.mezo import MeZO
from zoft.optim.momentum import Momentum
from zoft.optim.parts import Directions, Part, Projection, Rule
from zoft.optim.record import ProjectionRecord, Record, StepRecord
from zoft.optim.sign import Sign
from zoft.optim.sparse import SmallWeights
from zoft.optim.tuner import ZOFineTuner

__all__ = [
    "LOZO",
    "METHODS",
    "Adam",
    "Conservative",
    "DiZO",
    "Directions",
    "FirstOrderDiZO",
    "LOZOMomentum",
    "Layers",
    "MeZO",
    "Method",
    "Momentum",
    "Part",
    "Projection",
    "ProjectionRecord",
    "Record",
    "Rule",
    "ScalarAdam",
    "Sign",
    "SmallWeights",
    "StepRecord",
    "SubZero",
    "TeZO",
    "Whole",
    "ZOFineTuner",
    "ZOOptimizer",
    "get_method",
]
