"""Callback that refreshes labels: it makes a round of the label store before the epoch that is trained on it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from evocomp.config.schema import LabelConfig
from evocomp.labels.build import follows_compressor
from evocomp.labels.labeller import Interrupted, Labeller, LabelProgress
from evocomp.labels.records import Record
from evocomp.log import UserError, logger
from evocomp.mllm.features import Features
from evocomp.runs.checkpoints import DAMAGED, read_checkpoint
from evocomp.training.batch import TrainBatch, compressor_input, has_label, train_batch
from evocomp.training.cost import CostMeter
from evocomp.training.datamodule import LabelledQuestions
from evocomp.training.module import CompressorModule
from evocomp.training.strategy import whole

SCORED_TOGETHER = 64  # samples in one forward pass of the compressor


class RefreshLabels(L.Callback):
    """At the start of an epoch, makes the round of labels that it trains on, unless the label store has it.

    Works with every dataloader whose batches name questions of the labeller, see `question_ids`: the callback turns
    them into labelled batches for `CompressorModule`. Questions without a label in the round are left out of the batch;
    after an on-policy refresh these are all that were not drawn (`labels.samples_per_refresh`). `LabelledQuestions`
    gives labelled questions only, and resumes in mid-epoch.

    `ensure` is idempotent and is called from both `on_train_start` (which alone is called when a run resumes in
    mid-epoch) and `on_train_epoch_start`. The labeller, and with it the frozen MLLM, lives here and not in the
    LightningModule: checkpoints hold the compressor only.

    Args:
        labeller: makes the labels, see `evocomp.labels.build.labeller_for`.
        config: says when labels are refreshed.
        data: the datamodule that is told of each round; None if batches name questions.
        cost: adds up what labels cost; default: one of its own.
        report: called after each labelled question.
    """

    def __init__(
        self,
        labeller: Labeller,
        config: LabelConfig,
        data: LabelledQuestions | None = None,
        cost: CostMeter | None = None,
        report: Callable[[LabelProgress], None] = lambda progress: None,
    ):
        self.labeller = labeller
        self.data = data
        self.config = config
        self.records: dict[int, Record] = {}
        self.round = -1
        self.epoch = -1
        self.cost = cost or CostMeter(labeller.scorer)
        self.report = report

    @property
    def seconds(self) -> float:
        """Wall time spent on labels so far [s]."""
        return self.cost.spent["labelling"].seconds + self.cost.spent["refresh"].seconds

    def round_of(self, epoch: int) -> int:
        """The label round that an epoch is trained on."""
        return self.config.round_of(epoch)

    def setup(self, trainer: L.Trainer, module: CompressorModule, stage: str) -> None:
        if self.data is None:
            module.batch_of = partial(self._batch, trainer, module)

    def teardown(self, trainer: L.Trainer, module: CompressorModule, stage: str) -> None:
        module.batch_of = None  # or a copy of the module would hold the MLLM

    def on_train_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if trainer.ckpt_path is None and not trainer.global_step and follows_compressor(self.config):
            self.labeller.forget()  # rounds of an earlier run: this compressor is another
        self.ensure(trainer, module, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        self.ensure(trainer, module, trainer.current_epoch)

    def ensure(self, trainer: L.Trainer, module: CompressorModule, epoch: int) -> None:
        """Load the labels of an epoch into the datamodule; make them first if they are not in the store."""
        if epoch == self.epoch:
            return
        round = self.round_of(epoch)
        before = self.records
        if round != self.round:
            records = self._fill(trainer, module, round)
            self._log(trainer, round, records, before)
            records = {id: record for id, record in records.items() if has_label(record)}
            self.records, self.round = records, round
            self._forget_old(trainer)
        if self.data is not None:
            self.data.use(round, self.records, epoch)
        elif not self.records:
            raise UserError(f"round {round} of the label store holds no usable label; see the labelling log above")
        self.epoch = epoch

    def _batch(self, trainer: L.Trainer, module: CompressorModule, ids: Sequence[int]) -> TrainBatch | None:
        """The questions of these ids that have a label in this round; None if none has."""
        if self.epoch < 0:  # Lightning's Tuner trains without callbacks
            self.ensure(trainer, module, trainer.current_epoch)
        if unknown := [id for id in ids if id not in self.labeller.examples]:
            raise UserError(f"question {unknown[0]} of a batch is not among those that the labeller was given")
        ids = [id for id in ids if id in self.records]
        if not ids:
            return None
        return train_batch(self.labeller.mllm, self.labeller.encode(ids), [self.records[id] for id in ids], self.round)

    def _fill(self, trainer: L.Trainer, module: CompressorModule, round: int) -> dict:
        try:
            with self.cost.labelling(round):
                return self.labeller.ensure(round, scores=self._scores(whole(module)), report=self.report)
        except Interrupted:
            logger.info("labelling was stopped; run the same command again to resume")
            raise

    def _scores(self, module: CompressorModule):
        def scores(features: Sequence[Features], budgets: Sequence[float] | None) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for start in range(0, len(features), SCORED_TOGETHER):
                part = slice(start, start + SCORED_TOGETHER)
                inputs = compressor_input(self.labeller.mllm, features[part])
                found += module.score(inputs, None if budgets is None else budgets[part])
            return found

        return scores

    def _log(self, trainer: L.Trainer, round: int, records: dict, before: dict) -> None:
        """Log the quality of the labels of a round and the changes by the refresh."""
        metrics: dict[str, float] = {"labels/round": float(round)}
        usable = [has_label(record) for record in records.values()]
        metrics["labels/share_usable"] = float(np.mean(usable))
        for name in ("full_loss", "first_mean", "first_best", "best_loss", "spread"):
            values = [record[name] for record in records.values() if name in record]
            if values:
                metrics[f"labels/{name}"] = float(np.mean(values))
        shared = [id for id in records if id in before and "kept" in records[id] and "kept" in before[id]]
        if shared:
            changed = [not np.array_equal(records[id]["kept"], before[id]["kept"]) for id in shared]
            gain = [before[id]["best_loss"] - records[id]["best_loss"] for id in shared]
            metrics["labels/share_changed"] = float(np.mean(changed))
            metrics["labels/gain"] = float(np.mean(gain))
        metrics["labels/wait_seconds"] = self.labeller.waited
        for one in trainer.loggers:
            one.log_metrics(metrics, step=trainer.global_step)

    def _forget_old(self, trainer: L.Trainer) -> None:
        """Delete rounds that are needed neither by this epoch nor for resuming from a checkpoint of the run."""
        needed = min([self.round, *(_round_of(path) for path in _checkpoints(trainer))])
        # a round is made from the previous one, which is kept; round 0 may come from `evocomp label` and is kept too
        self.labeller.forget(range(1, min(needed, self.round - 1)))

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round}


def _checkpoints(trainer: L.Trainer) -> list[Path]:
    """Checkpoints in the folders to which this run writes them."""
    folders = {Path(one.dirpath) for one in trainer.checkpoint_callbacks if getattr(one, "dirpath", None)}
    return [path for folder in sorted(folders) for path in sorted(folder.glob("*.ckpt"))]


def _round_of(path: Path) -> int:
    """The label round that a checkpoint was trained on; 0 (keep all rounds) if it cannot be read."""
    try:
        return int(read_checkpoint(path)["callbacks"]["RefreshLabels"]["round"])
    except (UserError, TypeError, *DAMAGED):
        return 0
