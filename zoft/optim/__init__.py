"""Zeroth-order optimizers with the torch.optim interface, and first-order bounds; they know no files and no Hub."""

from zoft.optim.core.base import RecordOptimizer
from zoft.optim.core.exact import ExactHead
from zoft.optim.core.method import Method
from zoft.optim.core.optimizer import ZOOptimizer
from zoft.optim.core.oracle import Closure, FullObjective
from zoft.optim.core.parts import Directions, Part, Projection, Rule, Scales
from zoft.optim.core.record import ProjectionRecord, Record, StepRecord
from zoft.optim.methods import METHODS, get_method
from zoft.optim.methods.adam import Adam
from zoft.optim.methods.dizo import DiZO
from zoft.optim.methods.dizo_fo import FirstOrderDiZO
from zoft.optim.methods.fzoo import Signs, SpreadSteps
from zoft.optim.methods.hizoo import Curvature
from zoft.optim.methods.lezo import Layers
from zoft.optim.methods.lozo import LOZO
from zoft.optim.methods.lozo_m import LOZOMomentum
from zoft.optim.methods.mezo import MeZO
from zoft.optim.methods.mezo_adam import AdamSteps
from zoft.optim.methods.mezo_momentum import Momentum
from zoft.optim.methods.mezo_svrg import SVRG
from zoft.optim.methods.scalar_adam import ScalarAdam
from zoft.optim.methods.sgd import SGD
from zoft.optim.methods.sparse_mezo import SmallWeights
from zoft.optim.methods.subzero import SubZero
from zoft.optim.methods.tezo import TeZO
from zoft.optim.methods.zo_adamu import MomentumNoise, UncertainSteps
from zoft.optim.methods.zo_conservative import Conservative
from zoft.optim.methods.zo_dap import Aligned
from zoft.optim.methods.zo_finetuner import LearnedScales, ZOFineTuner
from zoft.optim.methods.zo_ldsd import LearnedMean
from zoft.optim.methods.zo_muon import Orthogonal, Subspace
from zoft.optim.methods.zo_sign import Sign

__all__ = [
    "LOZO",
    "METHODS",
    "SGD",
    "SVRG",
    "Adam",
    "AdamSteps",
    "Aligned",
    "Closure",
    "Conservative",
    "Curvature",
    "DiZO",
    "Directions",
    "ExactHead",
    "FirstOrderDiZO",
    "FullObjective",
    "LOZOMomentum",
    "Layers",
    "LearnedMean",
    "LearnedScales",
    "MeZO",
    "Method",
    "Momentum",
    "MomentumNoise",
    "Orthogonal",
    "Part",
    "Projection",
    "ProjectionRecord",
    "Record",
    "RecordOptimizer",
    "Rule",
    "ScalarAdam",
    "Scales",
    "Sign",
    "Signs",
    "SmallWeights",
    "SpreadSteps",
    "StepRecord",
    "SubZero",
    "Subspace",
    "TeZO",
    "UncertainSteps",
    "ZOFineTuner",
    "ZOOptimizer",
    "get_method",
]
