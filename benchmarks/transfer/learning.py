"""The tuners of a comparison: meta-trainings, given cards, and the gradient-energy control on the same tasks."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.transfer.folder import Folder
from benchmarks.transfer.plan import PRESETS, Method
from zoft import registry
from zoft.events import MetaEvent, MetaStepDone
from zoft.files import write_text
from zoft.metatrain import MetatrainConfig, metatrain
from zoft.metatrain.controls import energy_tuner, gradient_energy
from zoft.metatrain.sampling import batch_of, closure_of, prepare, task_of
from zoft.metatrain.start import ENERGY_BATCHES
from zoft.model.load import Loaded, load
from zoft.tuner.networks import PertNN
from zoft.weights.blocks import trainable_blocks

Say = Callable[[str], None]
TELL_EVERY = 20  # points of a meta-training


class Learning:
    """Prepares each method before its first run, once for all processes; ``common`` settings apply to every method."""

    def __init__(self, folder: Folder, common: dict[str, Any], meta_steps: int, say: Say) -> None:
        self.folder, self.common, self.meta_steps, self.say = folder, common, meta_steps, say

    def ready(self, method: Method) -> bool:
        """Whether ``method`` can run."""
        if method.name in PRESETS:
            return self._cost_file(method).is_file()
        return method.name != "energy" or self._energy_file(method).is_file()

    def make(self, method: Method) -> None:
        """Meta-train, resuming after a crash, or measure gradients."""
        config = self._config(method)
        if method.name == "energy":
            self.say(f"{method.label}: measuring gradients")
            began = time.perf_counter()
            energy = _energy(config).tolist()
            cost = {"forwards": 3 * ENERGY_BATCHES, "seconds": round(time.perf_counter() - began, 1)}
            write_text(self._cost_file(method), json.dumps(cost) + "\n")
            write_text(self._energy_file(method), json.dumps(energy) + "\n")
            return
        self.say(f"{method.label}: meta-training, {config.steps} points")
        result = metatrain(config, resume=True, on_event=self._progress(method))
        write_text(self._cost_file(method), json.dumps(result.public(), indent=1) + "\n")

    def networks(self, method: Method, loaded: Loaded) -> tuple[PertNN, str]:
        """Return the networks of ``method`` for the base as it was loaded, and what identifies them."""
        blocks = trainable_blocks(loaded.model)
        if method.name == "mezo":
            return PertNN([block.name for block in blocks]), "mezo"
        if method.name == "energy":
            return energy_tuner(blocks, torch.tensor(self._read_energy(method), dtype=torch.float64)), method.label
        file = method.file or str(self._config(method).card_file)
        tuner = registry.load(file, loaded.model, folder=loaded.path)
        return tuner.networks, tuner.digest

    def cost(self, method: Method) -> dict[str, Any] | None:
        """Forwards and seconds of the preparation of a method; None if unknown."""
        if method.file is not None:  # a card does not record how long it took
            return {"forwards": registry.Card.load(Path(method.file)).metadata.training.forwards, "seconds": None}
        file = self._cost_file(method)
        if not file.is_file():
            return None
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {key: stored.get(key) for key in ("forwards", "seconds", "meta_lr")}

    def _config(self, method: Method) -> MetatrainConfig:
        own = method.settings(self.meta_steps) if method.name in PRESETS else {}
        out = self.folder.tuners / f"{method.label}.tuner.safetensors"
        return MetatrainConfig(
            **self.common | own, tasks=method.tasks, steps=self.meta_steps, evidence=0, compare_every=0, out=out
        )

    def _progress(self, method: Method) -> Callable[[MetaEvent], None]:
        def tell(event: MetaEvent) -> None:
            if isinstance(event, MetaStepDone) and event.step % TELL_EVERY == 0:
                self.say(
                    f"{method.label}: point {event.step} of {event.steps}, loss {event.loss:.3f}, lr {event.lr:.2g}, "
                    f"scales {event.lowest:.2f} to {event.highest:.2f}"
                )

        return tell

    def _read_energy(self, method: Method) -> list[float]:
        return list(json.loads(self._energy_file(method).read_text(encoding="utf-8")))

    def _energy_file(self, method: Method) -> Path:
        return self.folder.tuners / f"{method.label}.json"

    def _cost_file(self, method: Method) -> Path:
        return self.folder.tuners / f"{method.label}.result.json"


def _energy(config: MetatrainConfig) -> torch.Tensor:
    """Return the gradient energies that a meta-training with ``config`` uses as a control."""
    loaded = load(config.model, dtype="fp32", device=config.device)
    data = [prepare(task, config, loaded) for task in config.tasks]

    def closures() -> Any:
        for point in range(ENERGY_BATCHES):
            which, number = task_of(point, len(data), config.seed)
            yield closure_of(
                data[which], batch_of(data[which].prepared.train, config, config.seed, number), loaded, config
            )

    return gradient_energy(trainable_blocks(loaded.model), closures())
