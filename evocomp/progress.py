"""Progress and remaining time of a command: a bar in a terminal, otherwise a log line every 20 seconds."""

import time
from dataclasses import dataclass

from evocomp.log import console, in_words, is_rank_zero, logger

LINE_EVERY_SECONDS = 20.0
DRAW_EVERY_SECONDS = 0.2


@dataclass
class Stage:
    """One stage of a command, with its own unit of work (questions, batches, ...).

    total, done: units of the whole command, including those done before an interruption.
    timed, seconds: units timed since this start, and the time they took.
    guess: expected seconds per unit, used until some are timed.
    """

    total: float = 0.0
    done: float = 0.0
    timed: float = 0.0
    seconds: float = 0.0
    guess: float = 0.0

    @property
    def seconds_left(self) -> float:
        """Estimated time until this stage is finished."""
        each = self.seconds / self.timed if self.timed else self.guess
        return max(0.0, self.total - self.done) * each

    def advance(self, units: float, seconds: float) -> None:
        """Record that `units` more units are done and took `seconds`."""
        self.done += units
        self.timed += units
        self.seconds += seconds


class Progress:
    """Shows the current activity and the remaining time of the whole command, on rank 0 only.

    >>> progress = Progress(labels=Stage(total=100, guess=2.0), training=Stage(total=10, guess=1.0))
    >>> progress.stages["labels"].advance(50, seconds=25.0)  # faster than expected
    >>> progress.seconds_left
    35.0
    """

    def __init__(self, **stages: Stage):
        self.stages = stages
        self._started = self._shown = time.monotonic()
        self._bar = None
        self._task = None

    @property
    def seconds_left(self) -> float:
        """Estimated time until all stages are finished."""
        return sum(stage.seconds_left for stage in self.stages.values())

    @property
    def _left(self) -> str:
        unknown = any(s.total > s.done and not s.timed and not s.guess for s in self.stages.values())
        return "" if unknown else f"about {in_words(self.seconds_left)} left"

    def show(self, text: str) -> None:
        """Show what is being done; updates the bar or writes a line at most once per interval."""
        if not is_rank_zero():
            return
        now = time.monotonic()
        if console().is_terminal:
            if self._bar is None or now - self._shown >= DRAW_EVERY_SECONDS:
                self._shown = now
                self._draw(text, now - self._started)
        elif now - self._shown >= LINE_EVERY_SECONDS:
            self._shown = now
            logger.info("%s", ", ".join(filter(None, (text, self._left))))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, text: str, spent: float) -> None:
        left = self._left
        share = spent / max(1e-9, spent + self.seconds_left) if left else 0.0
        if self._bar is None:
            self._bar = _new_bar()
            self._task = self._bar.add_task(text, total=1.0, completed=share, left=left)
            self._bar.start()
        self._bar.update(self._task, description=text, completed=share, left=left)
        self._bar.refresh()


def _new_bar():
    """A progress bar that takes one line at any terminal width and disappears when it is stopped."""
    from rich import progress, table

    def text(template: str, ratio: int | None = None) -> progress.TextColumn:
        column = table.Column(no_wrap=True, overflow="ellipsis", ratio=ratio)  # a ratio fills the line
        return progress.TextColumn(template, markup=False, table_column=column)

    return progress.Progress(
        text("{task.description}", ratio=1),
        progress.BarColumn(bar_width=12),
        text("{task.percentage:>3.0f} %"),
        text("{task.fields[left]}"),
        console=console(),
        transient=True,
        auto_refresh=False,
        expand=True,
    )
