"""Curves of a run in addition to losses and accuracy: baselines, speed of labelling, time.

Numbers go to every logger; histograms, images, the layout and the table of hyperparameters to TensorBoard only
(`evocomp.training.tensorboard`). Without a logger nothing is computed.
"""

import time
from typing import Any

import lightning as L
import numpy as np
import torch

from evocomp.training.module import CompressorModule
from evocomp.training.monitors import SelectionAccuracy, at_random
from evocomp.training.refresh_labels import RefreshLabels
from evocomp.training.strategy import whole
from evocomp.training.tensorboard import TensorBoardPage


class Curves(L.Callback):
    """Must come after `RefreshLabels` and `SelectionAccuracy` in the list of callbacks because it logs their results.

    Logged in every logger:

    - `train/gradient_norm`: of all trained weights, before clipping.
    - `labels/...` once per round: `mean_loss` of the last population, `per_second` and `forwards_per_second` of the
      whole job, `share_saved` (share of candidates that had been scored before), `wait_seconds_K` of rank K and
      `skew_seconds`, the difference between the longest and the shortest wait.
    - `random/accuracy/kept_R` and `uncompressed/accuracy/kept_R` for each `accuracy/kept_R`: the accuracy on the
      same questions with R random tokens and with all tokens. Measured once, logged as constants.
    - `time/...`: seconds so far of labelling, refreshes, training and measuring (the last since the latest start).

    Args:
        refresh, monitor: callbacks of the same trainer.
        settings: the settings of the run, for the table of hyperparameters.
        pictures: number of questions of the selection split whose images are logged whenever accuracy is measured;
            always the same questions, each about a different image.
        watched: number of labelled questions whose tokens are in the histograms.
    """

    def __init__(
        self,
        refresh: RefreshLabels,
        monitor: SelectionAccuracy,
        settings: dict[str, Any],
        pictures: int = 8,
        watched: int = 64,
    ):
        self.refresh = refresh
        self.monitor = monitor
        self.settings = settings
        self.pictures = pictures
        self.watched = watched
        self.references: dict[str, float] = {}
        self.page: TensorBoardPage | None = None
        self._round = -1
        self._before = (0.0, 0.0)
        self._measuring = 0.0
        self._trained = time.perf_counter()

    # ------------------------------------------------------------ start and end

    def on_fit_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        self._before = self._label_cost()  # > 0 in a resumed run

    def on_train_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if not trainer.loggers:
            return
        if self.monitor.examples:
            self.references = self._measure_references(trainer, module)
        self.page = TensorBoardPage.of(trainer, self.refresh, self.monitor, self.pictures, self.watched)
        if self.page is not None:
            self.page.open(self.settings)
        for logger in trainer.loggers:
            if self.page is None or logger is not self.page.logger:
                logger.log_hyperparams(self.settings)

    def on_train_end(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if self.page is not None:
            self.page.close()

    def _measure_references(self, trainer: L.Trainer, module: CompressorModule) -> dict[str, float]:
        """Accuracy on the selection split with random tokens and with all tokens, at each kept count and their mean."""
        first = self.monitor.mllm.readable(self.monitor.examples, most=1)
        every = max((len(features.visual) for _, features in first), default=1)
        counts = [*self.monitor.kept, every]
        *random, full = self.monitor.accuracy(at_random, counts, module.device)
        found = {}
        for count, share in zip(self.monitor.kept, random, strict=True):
            found |= {f"random/accuracy/kept_{count}": share, f"uncompressed/accuracy/kept_{count}": full}
        return found | {"random/accuracy/mean": float(np.mean(random)), "uncompressed/accuracy/mean": full}

    # ------------------------------------------------------------ every step

    def on_before_optimizer_step(self, trainer: L.Trainer, module: CompressorModule, optimizer) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if trainer.loggers and gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            module.log("train/gradient_norm", norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def on_train_batch_end(self, trainer: L.Trainer, module: CompressorModule, outputs, batch, batch_idx) -> None:
        self._trained = time.perf_counter()

    # ------------------------------------------------------------ every epoch

    def on_train_epoch_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if trainer.loggers and self.refresh.round != self._round:
            self._round = self.refresh.round
            self._log(trainer, self._label_speed(module))
            if self.page is not None:
                self.page.show_round(trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if not trainer.loggers:
            return
        if self.monitor.is_due(trainer):
            self._show_epoch(trainer, module)
        self._measuring += time.perf_counter() - self._trained
        times = {f"time/{purpose}_seconds": share.seconds for purpose, share in self.refresh.cost.spent.items()}
        times["time/measuring_seconds"] = self._measuring
        self._log(trainer, times)

    def _show_epoch(self, trainer: L.Trainer, module: CompressorModule) -> None:
        """Log and draw what belongs to an accuracy that has just been measured."""
        scoring = whole(module)  # a collective operation: every rank calls it, though only rank 0 draws
        if self.page is not None:
            self.page.show_epoch(scoring, trainer.global_step)
        for name, value in self.references.items():
            module.log(name, value)

    def _label_speed(self, module: CompressorModule) -> dict[str, float]:
        """Speed of the round that has just been labelled, over all ranks; empty if it was read from the store."""
        labeller, records = self.refresh.labeller, self.refresh.records
        now, before = self._label_cost(), self._before
        self._before = now
        mine = torch.tensor([now[0] - before[0], now[1] - before[1], labeller.waited], device=module.device)
        ranks = module.all_gather(mine).reshape(-1, 3).cpu().tolist()
        made, spent, waited = zip(*ranks, strict=True)
        metrics = {f"labels/wait_seconds_{rank}": wait for rank, wait in enumerate(waited)}
        metrics["labels/skew_seconds"] = max(waited) - min(waited)
        if sum(made):
            metrics["labels/per_second"] = len(records) / max(max(spent), 1e-9)
            metrics["labels/forwards_per_second"] = sum(made) / max(max(spent), 1e-9)
        losses = [record["losses"].mean() for record in records.values() if "losses" in record]
        if losses:
            metrics["labels/mean_loss"] = float(np.mean(losses))
        saved = sum(int(record.get("saved", 0)) for record in records.values())
        scored = sum(int(record.get("evaluations", 0)) for record in records.values())
        if saved + scored:
            metrics["labels/share_saved"] = saved / (saved + scored)
        return metrics

    def _label_cost(self) -> tuple[float, float]:
        """Number of masks scored by this process in all rounds so far, and the seconds that this took."""
        shares = [self.refresh.cost.spent[purpose] for purpose in ("labelling", "refresh")]
        return float(sum(share.forwards for share in shares)), sum(share.seconds for share in shares)

    @staticmethod
    def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
