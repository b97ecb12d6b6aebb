"""The learned part of a meta-training: networks and learning rate, their updates, and their snapshots."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from zoft.errors import RunError
from zoft.files import replacing
from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.controls import warm_start_
from zoft.tuner.networks import Level, PertNN

KEY = "zoft"


class Learner(torch.nn.Module):
    """A tuner, the logarithm of the zeroth-order learning rate, and the optimizer of both.

    With Adam the output biases, which are logarithms of scales, move by up to ``tuner_lr`` a point; the other weights
    by ``tuner_lr / hidden``, so that all of a network's weights together move its output about as far. At every
    point the output layers are also pulled back towards their start, 0 (where the tuner is MeZO) or a warm start: by
    the share ``tuner_lr * pull`` of the distance, ``residual_pull`` in the levels after the first, which set single
    blocks apart. So a logarithm ends no further out than ``1 / pull``, and only if point after point agrees. Without
    the pull it has no limit: the gain of a single step is largest with all of it in the one block that has the most
    gradient for its curvature.
    """

    origin: torch.Tensor

    def __init__(self, tuner: PertNN, config: MetatrainConfig) -> None:
        super().__init__()
        self.tuner = tuner
        self.log_lr = torch.nn.Parameter(torch.tensor(config.lr, dtype=torch.float64).log())
        self.log_lr.requires_grad_(config.learn_lr)
        self.register_buffer("origin", torch.zeros_like(_first_biases(tuner)))
        self._pulls = [config.pull] + [config.residual_pull] * (len(tuner.levels) - 1)
        self.optimizer = _optimizer(self, config)
        self._learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._anneal = config.tuner_optimizer == "adam"
        self._pulling = self._anneal and config.activation == "exp"  # an output of 0 is sigma = 1 there, and 0 with abs

    def start_from(self, sigma: torch.Tensor) -> None:
        """Start the tuner at ``sigma``, ``(n,)``, pooled by the groups of its first level, and pull it back there."""
        warm_start_(self.tuner, sigma)
        self.origin.copy_(_first_biases(self.tuner).detach())

    @property
    def lr(self) -> float:
        """Learning rate of the zeroth-order step."""
        return float(self.log_lr.detach().exp())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def learn(self, lr_gradient: float, left: float = 1.0) -> None:
        """Update the networks by their gradients, and the rate by ``lr_gradient``, that of its logarithm.

        ``left`` is the remaining share of the meta-training; with Adam, learning rates fall with it, so that the result
        is an average over many points.
        """
        for group, lr in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = lr * left if self._anneal else lr
        if self.log_lr.requires_grad:
            self.log_lr.grad = torch.tensor(lr_gradient, dtype=torch.float64)
        self.optimizer.step()
        if self._pulling:
            self._pull_back(self._learning_rates[0] * left)

    @torch.no_grad()
    def _pull_back(self, lr: float) -> None:
        for number, (level, pull) in enumerate(zip(self.tuner.levels, self._pulls, strict=True)):
            assert isinstance(level, Level)
            kept = max(0.0, 1 - lr * pull)
            level.w2.mul_(kept)
            level.b2.mul_(kept)
            if number == 0:
                level.b2.add_(self.origin, alpha=1 - kept)

    def save(self, path: Path, counters: dict[str, Any], job: str = "") -> None:
        """Write everything that resuming needs, with ``counters`` (JSON values), whole or not at all.

        The metadata hold a digest over all tensors, the counters and ``job``, which identifies the meta-training.
        """
        tensors = {f"model.{name}": tensor.contiguous() for name, tensor in self.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
        with replacing(path) as temporary:
            text = json.dumps(counters)
            temporary.write_bytes(save(tensors, {KEY: text, "digest": _digest(tensors, text, job)}))

    def load(self, path: Path, job: str = "") -> dict[str, Any]:
        """Restore the state that `save` wrote and return the counters.

        `RunError` if the file is damaged or of another meta-training than ``job``; the learner is then unchanged.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
                metadata = dict(file.metadata())
            counters = dict(json.loads(metadata[KEY]))
            old = set(metadata) <= {KEY, "format"}  # of zoft 0.1: no digest
            if not old and metadata.get("digest") != _digest(tensors, metadata[KEY], job):
                raise ValueError("it does not have the SHA-256 of this meta-training that it was written with")
            self.load_state_dict(_under("model.", tensors))
            self._load_optimizer(tensors)
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.load_state_dict(before)
            self.optimizer.state.clear()
            raise RunError(f"{path} is damaged or of another meta-training ({error})") from error
        return counters

    def _load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _digest(tensors: dict[str, torch.Tensor], counters: str, job: str) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and bytes of ``tensors``, the counters and the job."""
    digest = hashlib.sha256(repr((counters, job)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first_biases(tuner: PertNN) -> torch.Tensor:
    """Output biases of the first level, which a warm start sets."""
    level = tuner.levels[0]
    assert isinstance(level, Level)
    return level.b2


def _optimizer(learner: Learner, config: MetatrainConfig) -> torch.optim.Optimizer:
    if config.tuner_optimizer == "sgd":
        groups = [{"params": list(learner.tuner.parameters()), "lr": config.tuner_lr}]
        return torch.optim.SGD([*groups, {"params": [learner.log_lr], "lr": config.tuner_lr}])
    levels = [level for level in learner.tuner.levels if isinstance(level, Level)]
    biases = [level.b2 for level in levels]
    others = [weight for level in levels for weight in (level.w1, level.b1, level.w2)]
    groups = [
        {"params": [*biases, learner.log_lr], "lr": config.tuner_lr},
        {"params": others, "lr": config.tuner_lr / config.hidden},
    ]
    return torch.optim.Adam(groups)


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
