"""Callback that refreshes labels: it makes a round of the label store before the epoch that is trained on it."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from evocomp.config.schema import LabelConfig
from evocomp.labels.labeller import Interrupted, Labeller, LabelProgress
from evocomp.log import logger
from evocomp.mllm.features import Features
from evocomp.training.batch import compressor_input, has_label
from evocomp.training.cost import CostMeter
from evocomp.training.datamodule import LabelledQuestions
from evocomp.training.module import CompressorModule
from evocomp.training.strategy import whole

SCORED_TOGETHER = 64  # samples in one forward pass of the compressor


class RefreshLabels(L.Callback):
    """At the start of an epoch, makes its round of labels if necessary and passes it to the datamodule.

    `ensure` is idempotent. It is called from `on_train_epoch_start` and from `on_train_start`, because only the latter
    is called when a run resumes within an epoch. The labeller with the frozen MLLM is an attribute of this callback and
    not of the LightningModule, so that checkpoints contain only the compressor.
    """

    def __init__(
        self,
        labeller: Labeller,
        data: LabelledQuestions,
        config: LabelConfig,
        cost: CostMeter,
        report: Callable[[LabelProgress], None] = lambda progress: None,
    ):
        self.labeller = labeller
        self.data = data
        self.config = config
        self.round = -1
        self.epoch = -1
        self.cost = cost
        self.report = report

    @property
    def seconds(self) -> float:
        """Wall time spent on labels so far [s]."""
        return self.cost.spent["labelling"].seconds + self.cost.spent["refresh"].seconds

    def round_of(self, epoch: int) -> int:
        """The label round that an epoch is trained on."""
        return self.config.round_of(epoch)

    def on_train_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        self.ensure(trainer, module, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        self.ensure(trainer, module, trainer.current_epoch)

    def ensure(self, trainer: L.Trainer, module: CompressorModule, epoch: int) -> None:
        """Load the labels of an epoch into the datamodule; make them first if they are not in the store."""
        if epoch == self.epoch:
            return
        round = self.round_of(epoch)
        before = self.data.records
        if round != self.round:
            records = self._fill(trainer, module, round)
            self._log(trainer, round, records, before)
            records = {id: record for id, record in records.items() if has_label(record)}
            self.round = round
            self._forget_old(trainer)
        else:
            records = before
        self.data.use(round, records, epoch)
        self.epoch = epoch

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
        # a sharded checkpoint is a folder; this file contains everything but weights and optimizer state
        content = torch.load(path / "meta.pt" if path.is_dir() else path, mmap=True, weights_only=False)
        return int(content["callbacks"]["RefreshLabels"]["round"])
    except (OSError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError):
        return 0
