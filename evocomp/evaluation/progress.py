"""Progress of an evaluation: finished rows of the table, and the time left."""

import time

from evocomp.progress import Progress, Stage


class EvaluationProgress:
    """Counts the rows that a panel starts. A context manager that always removes the progress bar at its end.

    Args:
        rows: number of rows: methods times numbers of kept tokens.
    """

    def __init__(self, rows: int):
        self._stage = Stage(total=rows)
        self._progress = Progress(evaluation=self._stage)
        self._begun = -1
        self._started = time.monotonic()

    def row(self, name: str) -> None:
        """Called when a row starts: all rows before it are finished."""
        self._begun += 1
        self._stage.done = self._stage.timed = min(self._begun, self._stage.total)
        self._stage.seconds = time.monotonic() - self._started
        self._progress.show(f"evaluation: {self._stage.done:.0f}/{self._stage.total:.0f} rows of the table")

    def __enter__(self) -> "EvaluationProgress":
        return self

    def __exit__(self, *_) -> None:
        self._progress.close()
