"""Zeroth-order optimizers with the torch.optim interface, and first-order bounds; they know no files and no Hub."""

from zoft.optim.adam import AdamSteps, ScalarAdam
from zoft.optim.adamu import MomentumNoise, UncertainSteps
from zoft.optim.conservative import Conservative
from zoft.optim.dap import Aligned
from zoft.optim.dizo import DiZO, FirstOrderDiZO
from zoft.optim.engine import ZOOptimizer
from zoft.optim.first_order import SGD, Adam
from zoft.optim.fzoo import Signs, SpreadSteps
from zoft.optim.hizoo import Curvature
from zoft.optim.ldsd import LearnedMean
from zoft.optim.lezo import Layers
from zoft.optim.look import Whole
from zoft.optim.lowrank import LOZO, SubZero, TeZO
from zoft.optim.lozo_m import LOZOMomentum
from zoft.optim.methods import METHODS, Method, get_method
from zoft.optim.mezo import MeZO
from zoft.optim.momentum import Momentum
from zoft.optim.muon import Orthogonal, Subspace
from zoft.optim.parts import Directions, Part, Projection, Rule
from zoft.optim.record import ProjectionRecord, Record, StepRecord
from zoft.optim.sign import Sign
from zoft.optim.sparse import SmallWeights
from zoft.optim.svrg import SVRG
from zoft.optim.tuner import ZOFineTuner

__all__ = [
    "LOZO",
    "METHODS",
    "SGD",
    "SVRG",
    "Adam",
    "AdamSteps",
    "Aligned",
    "Conservative",
    "Curvature",
    "DiZO",
    "Directions",
    "FirstOrderDiZO",
    "LOZOMomentum",
    "Layers",
    "LearnedMean",
    "MeZO",
    "Method",
    "Momentum",
    "MomentumNoise",
    "Orthogonal",
    "Part",
    "Projection",
    "ProjectionRecord",
    "Record",
    "Rule",
    "ScalarAdam",
    "Sign",
    "Signs",
    "SmallWeights",
    "SpreadSteps",
    "StepRecord",
    "SubZero",
    "Subspace",
    "TeZO",
    "UncertainSteps",
    "Whole",
    "ZOFineTuner",
    "ZOOptimizer",
    "get_method",
]
