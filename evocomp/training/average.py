"""Averaged weights, begun where averaging begins to help."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.types import STEP_OUTPUT


class AverageFromEpoch(EMAWeightAveraging):
    """Exponential moving average of the weights over the steps from an epoch on; the weights themselves before it.

    (Lightning's `update_starting_at_epoch` adds an update at the end of later epochs and holds back none of the steps.)

    Args:
        decay: share of the average that a step keeps.
        start: first epoch (from 0) that counts; the average sets out from the weights at its beginning.
    """

    def __init__(self, decay: float, start: int):
        super().__init__(decay=decay)
        self.start = start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average; before `start` as for the first time, which makes it a copy of the weights."""
        if trainer.current_epoch < self.start:
            self._average_model.n_averaged.zero_()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
