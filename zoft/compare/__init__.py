"""Compare methods under one budget of forward passes: models x tasks x methods x learning rates x seeds."""

from zoft.compare.cells import CellDone, CellStarted, CompareEvent
from zoft.compare.config import CompareConfig, MethodSpec, ModelSpec
from zoft.compare.result import CompareResult
from zoft.compare.run import compare

__all__ = [
    "CellDone",
    "CellStarted",
    "CompareConfig",
    "CompareEvent",
    "CompareResult",
    "MethodSpec",
    "ModelSpec",
    "compare",
]
