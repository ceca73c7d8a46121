"""Exponential moving average of the weights that starts at a given epoch."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.types import STEP_OUTPUT


class AverageFromEpoch(EMAWeightAveraging):
    """Exponential moving average of the weights over all steps from epoch `start` on; before it, a copy of the weights.

    (Lightning's `update_starting_at_epoch` only adds an update at the end of later epochs; it does not skip steps.)

    Args:
        decay: weight of the old average in each update.
        start: first epoch (from 0) that is averaged; the average is initialised with the weights at its beginning.
    """

    def __init__(self, decay: float, start: int):
        super().__init__(decay=decay)
        self.start = start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Update the average. Before `start` the update count is reset, so the average is a copy of the weights."""
        if trainer.current_epoch < self.start:
            self._average_model.n_averaged.zero_()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
