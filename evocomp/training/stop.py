"""Clean stop on SIGTERM (preemption, time limit): training ends with a checkpoint of the current step."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from evocomp.distributed import StopRequest
from evocomp.labels.labeller import Interrupted


class NoteStop(L.Callback):
    """Records SIGTERM in `request`. Must be the first callback, because others label in `on_train_start`.

    It replaces Lightning's own handler, which starts a collective operation inside the signal handler and can collide
    with one that is already running.
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
        self._leave()  # else the handler would also stop the next run of this process, for example in a notebook

    def _leave(self) -> None:
        if self._listening:
            self._listening = False
            self.request.__exit__()


class StopCleanly(L.Callback):
    """Ends training at the same step on all ranks if any of them got SIGTERM, with a checkpoint at `path`.

    Must be the last callback, so that all others have finished the step.
    """

    def __init__(self, request: StopRequest, path: Path):
        self.request = request
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if progress.is_last_batch:
            return  # the end of the epoch writes a checkpoint; the next batch checks again
        if progress.current.ready % trainer.accumulate_grad_batches:
            return  # checkpoints do not contain accumulated gradients
        asked = torch.tensor(int(self.request.asked), device=module.device)
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce(asked, reduce_op="max")
        if asked:
            trainer.save_checkpoint(self.path)
            raise Interrupted("training was stopped; run the same command again to resume from this step")
