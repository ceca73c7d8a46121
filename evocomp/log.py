"""Messages to the user: logger, console, one-time warnings, durations, and the exit codes of errors."""

import errno
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


LONGEST = 1000
"""Characters of a message about a mistake; what it quotes may be of any length."""


def printable(text: str) -> str:
    """Text without characters that steer a terminal, or that cannot be written; they are shown as escapes.

    >>> printable("a" + chr(27) + "[31m") == "a" + chr(92) + "x1b[31m"
    True
    """
    steers = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
    return text.translate(steers).encode("utf-8", "backslashreplace").decode()


def one_line(message: object) -> str:
    """A message on one line of limited length, printable."""
    text = printable(" ".join(str(message).splitlines()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


class _Handler(logging.Handler):
    """Writes messages to standard error; in a terminal, through `console`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = printable(self.format(record))
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


_NOT_OURS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EROFS EACCES EPERM EIO ENOENT ENOTDIR EISDIR ENAMETOOLONG ESTALE EMFILE ENFILE".split()
}
"""Errors of a disk: full, read-only, gone, failing. A folder that is deleted during a run is one too."""


class UserError(Exception):
    """A user-correctable error: its message is one line; exit code 2, no traceback."""

    def __str__(self) -> str:
        return one_line(super().__str__())  # messages quote names, paths and other errors, which may hold line breaks


def exit_code(command: Callable[[], int | None], name: str) -> int:
    """Run a command and return its exit code: 0 or what it returns, 2 for a `UserError`, 130 for Ctrl-C."""
    try:
        return command() or 0
    except UserError as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        place = f"{str(error.filename)[:300]}: " if error.filename is not None else ""
        advice = "mend this and run the same command again; what was finished before is kept"
        print(f"{name}: {one_line(place + str(error.strerror))}; {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
