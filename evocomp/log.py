"""Messages to the user: logger, console, one-time warnings, durations, and the exit codes of errors."""

import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("evocomp")
_warned: set[str] = set()


def is_rank_zero() -> bool:
    """Whether this process is rank 0, by the variables that torchrun, Slurm and Lightning's launcher set."""
    for variable in ("RANK", "SLURM_PROCID"):
        if variable in os.environ:
            return int(os.environ[variable]) == 0
    return all(int(os.environ.get(variable, "0")) == 0 for variable in ("NODE_RANK", "LOCAL_RANK"))


@cache
def console() -> "Console":
    """Console on standard error. Messages and progress bars share it, so that messages are printed above the bar."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class _Handler(logging.Handler):
    """Writes messages to standard error; in a terminal, through `console`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if sys.stderr.isatty():
                console().print(text, markup=False, emoji=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def setup(level: str = "INFO") -> None:
    """Log to standard error as plain text: all messages of rank 0, only errors of other ranks."""
    if not logger.handlers:
        handler = _Handler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level if is_rank_zero() else "ERROR")


def warn_once(message: str) -> None:
    """Log a warning, but only once per process for each message."""
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def in_words(seconds: float) -> str:
    """A duration as text with a suitable unit.

    >>> in_words(8), in_words(200), in_words(9000), in_words(400_000)
    ('8 s', '3 min', '2.5 h', '4.6 days')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:.1f} days"


class UserError(Exception):
    """A user-correctable error: printed as one line, exit code 2, no traceback."""


def exit_code(command: Callable[[], int | None], name: str) -> int:
    """Run a command and return its exit code: 0 or what it returns, 2 for a `UserError`, 130 for Ctrl-C."""
    try:
        return command() or 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
