"""A job that is told to stop (SIGTERM: preemption, time limit) leaves a checkpoint of the very step it was at."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from evocomp.distributed import StopRequest
from evocomp.labels.labeller import Interrupted


class NoteStop(L.Callback):
    """Notes SIGTERM in `request`. Comes first among the callbacks: others label in `on_train_start`.

    It takes the place of Lightning's own handler, which starts a collective inside the signal handler and so can
    meet another one that is under way.
    """

    def __init__(self, request: StopRequest):
        self.request = request
        self._listening = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.request.__enter__()
        self._listening = True

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._leave()  # else the next run of this process, in a notebook, would be told to stop as well

    def _leave(self) -> None:
        if self._listening:
            self._listening = False
            self.request.__exit__()


class StopCleanly(L.Callback):
    """Ends training at the same step on all ranks when any of them was asked to, with a checkpoint at `path`.

    Comes last among the callbacks: the others have then finished the step too.
    """

    def __init__(self, request: StopRequest, path: Path):
        self.request = request
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return  # the epoch's end has its own checkpoint; what comes next looks again
        if progress.current.ready % trainer.accumulate_grad_batches:
            return  # no checkpoint holds gradients of which more are to be added
        asked = torch.tensor(int(self.request.asked), device=module.device)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce(asked, reduce_op="max")
        if asked:
            trainer.save_checkpoint(self.path)
            raise Interrupted("stopped in training; the same command goes on from this step")
