"""Zeroth-order optimizers with the torch.optim interface, and first-order bounds; they know no files and no Hub."""

from zoft.optim.core.lowrank import LOZO, SubZero, TeZO
from zoft.optim.core.optimizer import ZOOptimizer
from zoft.optim.core.oracle import Whole
from zoft.optim.core.parts import Directions, Part, Projection, Rule
from zoft.optim.core.record import ProjectionRecord, Record, StepRecord
from zoft.optim.methods.adam import AdamSteps, ScalarAdam
from zoft.optim.methods.adamu import MomentumNoise, UncertainSteps
from zoft.optim.methods.conservative import Conservative
from zoft.optim.methods.dap import Aligned
from zoft.optim.methods.dizo import DiZO, FirstOrderDiZO
from zoft.optim.methods.first_order import SGD, Adam
from zoft.optim.methods.fzoo import Signs, SpreadSteps
from zoft.optim.methods.hizoo import Curvature
from zoft.optim.methods.ldsd import LearnedMean
from zoft.optim.methods.lezo import Layers
from zoft.optim.methods.lozo_m import LOZOMomentum
from zoft.optim.methods.mezo import MeZO
from zoft.optim.methods.momentum import Momentum
from zoft.optim.methods.muon import Orthogonal, Subspace
from zoft.optim.methods.sign import Sign
from zoft.optim.methods.sparse import SmallWeights
from zoft.optim.methods.svrg import SVRG
from zoft.optim.methods.table import METHODS, Method, get_method
from zoft.optim.methods.zoft import ZOFineTuner

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
