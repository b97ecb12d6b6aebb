"""Stage two: the fine-tuning loop, its journal and run folder, replay and evaluation."""

from zoft.deploy.config import EvalConfig, FinetuneConfig
from zoft.deploy.evaluate import evaluate_model
from zoft.deploy.finetune import finetune
from zoft.deploy.replay import replay
from zoft.deploy.result import EvalResult, FinetuneResult, ReplayResult
from zoft.events import Evaluated, Event, Listener, Noted, Progress, Started, StepDone, Warned

__all__ = [
    "EvalConfig",
    "EvalResult",
    "Evaluated",
    "Event",
    "FinetuneConfig",
    "FinetuneResult",
    "Listener",
    "Noted",
    "Progress",
    "ReplayResult",
    "Started",
    "StepDone",
    "Warned",
    "evaluate_model",
    "finetune",
    "replay",
]
