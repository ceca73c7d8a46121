"""Progress of labelling: a second bar beside Lightning's, or a plain line where there is no terminal."""

import time

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from evocomp.labels.labeller import LabelProgress
from evocomp.log import logger

LINE_EVERY_SECONDS = 20.0
BAR_EVERY_SECONDS = 0.2


class LabelBar:
    """Shows a `LabelProgress`; without a terminal it writes a line now and then, and one at the end.

    Args:
        trainer: whose rich progress bar to sit beside; None = a terminal of one's own is not used.
    """

    def __init__(self, trainer: L.Trainer | None = None):
        self._progress = None
        self._task = None
        self._last: LabelProgress | None = None
        self._shown_at = time.monotonic()
        if trainer is not None:
            bar = next((c for c in trainer.callbacks if isinstance(c, RichProgressBar)), None)
            progress = getattr(bar, "progress", None)
            if progress is not None and progress.console.is_terminal:
                self._progress = progress

    def show(self, state: LabelProgress) -> None:
        """Called after each sample."""
        self._last = state
        now = time.monotonic()
        if self._progress is None:
            if now - self._shown_at >= LINE_EVERY_SECONDS:
                self._shown_at = now
                logger.info(state.line())
            return
        if self._task is None:
            self._task = self._progress.add_task("labels", total=state.total)
        if now - self._shown_at >= BAR_EVERY_SECONDS or state.done == state.total:
            self._shown_at = now
            text = state.line().removeprefix("labels, ")
            self._progress.update(self._task, completed=state.done, total=state.total, description=text)
            self._progress.refresh()

    def close(self) -> None:
        """Take the bar away and leave one line behind."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        if self._last is not None:
            logger.info(self._last.line())
