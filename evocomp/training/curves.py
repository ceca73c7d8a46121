"""What a run shows while it trains, beside losses and accuracy: where labels and time go, and what the tokens do.

Numbers go to every logger; histograms, pictures, the layout and the hyperparameter table to TensorBoard alone
(`training.tensorboard`), and nothing is computed for a logger that is not there.
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
    """Comes after `RefreshLabels` and `SelectionAccuracy` in the list of callbacks, whose results it shows.

    Logged in every logger:

    - `train/gradient_norm`: of all trained weights, before clipping.
    - `labels/...` once a round: `mean_loss` of the last population, `per_second` and `forwards_per_second` of the
      whole job, `share_saved` (candidates that had been scored before), `wait_seconds_K` of rank K and `skew_seconds`
      between the ranks that waited most and least.
    - `val/random_R` and `val/full` beside each `val/accuracy_R`: what as many tokens drawn evenly, and all of them,
      give on the same questions. Measured once, drawn as level lines.
    - `time/...`: seconds so far that went to labelling, refreshes, training, and measuring (which starts anew where a
      run is resumed).

    Args:
        refresh, monitor: the run's own.
        settings: of the run, for the table of hyperparameters.
        pictures: questions of the selection split that are shown whenever accuracy is measured, always the same,
            each about another picture.
        watched: labelled questions whose tokens make the histograms.
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
        self._before = self._label_cost()  # a resumed run has spent something already

    def on_train_start(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if not trainer.loggers:
            return
        if self.monitor.examples:
            self.references = self._measure_references(trainer, module)
        self.page = TensorBoardPage.of(trainer, self.refresh, self.monitor, self.pictures, self.watched)
        if self.page is not None:
            self.page.open(self.settings)
        else:
            for logger in trainer.loggers:
                logger.log_hyperparams(self.settings)

    def on_train_end(self, trainer: L.Trainer, module: CompressorModule) -> None:
        if self.page is not None:
            self.page.close({name: float(value) for name, value in trainer.callback_metrics.items()})

    def _measure_references(self, trainer: L.Trainer, module: CompressorModule) -> dict[str, float]:
        """Accuracy on the selection split with tokens drawn evenly, at each kept count, and with all of them."""
        every = max(len(one.visual) for one in self.monitor.mllm.features(self.monitor.examples[:1]))
        counts = [*self.monitor.kept, every]
        shares = self.monitor.accuracy(at_random, counts, module.device)
        names = [*(f"val/random_{count}" for count in self.monitor.kept), "val/full"]
        return dict(zip(names, shares, strict=True))

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
        """What goes beside an accuracy that has just been measured."""
        scoring = whole(module)  # every rank has a part in this, though rank 0 alone draws
        if self.page is not None:
            self.page.show_epoch(scoring, trainer.global_step)
        for name, value in self.references.items():
            module.log(name, value)

    def _label_speed(self, module: CompressorModule) -> dict[str, float]:
        """Speed of the round that has just been made, over all ranks; nothing if it lay in the store."""
        labeller, records = self.refresh.labeller, self.refresh.data.records
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
        """Masks scored by this process, and the seconds that this took, in all rounds so far."""
        shares = [self.refresh.cost.spent[purpose] for purpose in ("labelling", "refresh")]
        return float(sum(share.forwards for share in shares)), sum(share.seconds for share in shares)

    @staticmethod
    def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
