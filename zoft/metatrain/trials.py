"""The runs of the evidence: contenders fine-tune the base on held-out rows, one after another."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from zoft import tasks
from zoft.errors import Interrupted
from zoft.events import MetaListener, Progress, TrialDone
from zoft.metatrain.build_card import with_evidence
from zoft.metatrain.config import MetatrainConfig
from zoft.metatrain.controls import energy_tuner, random_tuner
from zoft.metatrain.evidence import Contender, Rounds, Trial, compete, evidence_rows, judge, trial_of, trial_row
from zoft.metatrain.job import JobFolder
from zoft.metatrain.rounding import rounding
from zoft.metatrain.sampling import HeldOut, batch_of, closure_of, computing
from zoft.model.load import Loaded, restore_
from zoft.optim import ZOFineTuner
from zoft.registry import Card, Evidence, unpack
from zoft.tasks import Encoded, tokens_read
from zoft.tuner.networks import PertNN
from zoft.tuner.normalisation import effective_sizes
from zoft.weights.blocks import Block


def stored_trials(folder: JobFolder) -> list[Trial]:
    """Return the trials that the job in ``folder`` has done; damaged rows are left out, and their runs repeated."""
    return [trial for row in folder.rows(folder.evidence) if (trial := trial_of(row)) is not None]


def best_trials(job: Path) -> list[Trial]:
    """Return each contender's trials at its best rate in its longest runs, from the folder of a job."""
    contenders = Evidence(stored_trials(JobFolder(job))).contenders()
    return [trial for own in contenders.values() for trial in own.longest().at_best_rate().runs]


class Trials:
    """Tests a card on ``rows``; trials that a stopped job has done are read from its folder."""

    def __init__(
        self,
        config: MetatrainConfig,
        loaded: Loaded,
        blocks: Sequence[Block],
        rows: HeldOut,
        rounds: Rounds,
        folder: JobFolder,
        on_event: MetaListener,
        cancelled: Callable[[], bool],
    ) -> None:
        self.config, self.loaded, self.blocks, self.rows, self.rounds = config, loaded, blocks, rows, rounds
        self.folder, self.on_event, self.cancelled = folder, on_event, cancelled

    def test(self, card: Card, energy: torch.Tensor, centre: float) -> Card:
        """Return ``card`` with its evidence; the model must be the base, and is the base afterwards.

        Args:
            card: the card, read back from disk.
            energy: mean squared gradient per weight of the blocks, ``(n,)``, for the energy control.
            centre: learning rate around which the runs search.
        """
        config, rows = self.config, self.rows
        contenders = self._contenders(card, energy)
        start, _ = self._score(rows.report)
        done = {trial.key: trial for trial in stored_trials(self.folder)}
        finished: list[Trial] = []

        def run(contender: Contender, lr: float, seed: int, steps: int) -> Trial:
            key = (contender.name, contender.strength, lr, seed, 2 * steps)
            trial = done.get(key) or self._run(contender, lr, seed, steps, start)
            if key not in done:
                self.folder.add_row(self.folder.evidence, trial_row(trial))
            finished.append(trial)
            self.on_event(
                TrialDone(
                    done=len(finished),
                    total=self.rounds.runs,
                    name=contender.label,
                    task=rows.data.name,
                    lr=lr,
                    forwards=trial.forwards,
                    loss_start=trial.loss_start,
                    loss=trial.loss,
                )
            )
            return trial

        seeds = range(config.seed + 1, config.seed + 1 + config.evidence_seeds)
        trials = compete(contenders, run, centre, seeds, self.rounds)
        where = f"{len(rows.report)} held-out {rows.data.name} rows ({rows.split})"
        verdict = judge(trials, select_strength=config.select_strength, where=where)
        kept = evidence_rows(trials, task=rows.data.name, split=rows.split, eps=config.eps)
        return with_evidence(card, kept, verdict.text, verdict.strength, verdict.lr, config.eps)

    def _contenders(self, card: Card, energy: torch.Tensor) -> list[Contender]:
        names = [block.name for block in self.blocks]
        return [
            *(Contender("tuner", unpack(card), strength) for strength in self.config.strengths),
            Contender("mezo", PertNN(names)),
            Contender("energy", energy_tuner(self.blocks, energy)),
            Contender("random", random_tuner(self.blocks, self.config.seed)),
        ]

    def _run(self, contender: Contender, lr: float, seed: int, steps: int, start: float) -> Trial:
        """Fine-tune the base, whose loss is ``start``, for ``steps``; a run that diverges ends early."""
        config, rows = self.config, self.rows
        net = copy.deepcopy(contender.net)
        net.strength = contender.strength
        batch: list[Encoded] = []
        optimizer = ZOFineTuner(
            self.loaded.model,
            net,
            lr=lr,
            eps=config.eps,
            seed=seed,
            sizes=lambda: effective_sizes(net, self.loaded.model, self.blocks, tokens_read(batch)),
        )
        loss = start
        try:
            for number in range(steps):
                batch[:] = batch_of(rows.train, config, seed, number)
                with rounding(self.blocks, config.dtype, config.seed):
                    loss = optimizer.step(closure_of(rows.data, batch, self.loaded, config))
                self.on_event(Progress(f"testing {contender.label} at {lr:.1g}", number + 1, steps))
                if self.cancelled():
                    raise Interrupted("stopped while the tuner was tested; --resume goes on with the remaining runs")
                if not math.isfinite(loss):
                    break
            chosen_by, _ = self._score(rows.choose) if math.isfinite(loss) else (math.nan, None)
            loss, metric = self._score(rows.report) if math.isfinite(loss) else (math.nan, None)
        finally:
            restore_(self.loaded)
        return Trial(
            name=contender.name,
            strength=contender.strength,
            lr=lr,
            seed=seed,
            forwards=2 * steps,
            loss_start=start,
            loss=loss,
            chosen_by=chosen_by,
            metric=metric,
            metric_name=rows.data.prepared.task.metric,
        )

    def _score(self, encoded: Sequence[Encoded]) -> tuple[float, float | None]:
        with rounding(self.blocks, self.config.dtype, self.config.seed), computing(self.loaded, self.config):
            scores = tasks.evaluate(
                self.loaded.model,
                self.loaded.tokenizer,
                self.rows.data.prepared.task,
                encoded,
                batch_size=self.config.eval_batch_size,
                generating=False,
            )
        return scores.loss, scores.metric
