"""Locks of label stores: a store that other processes use is not overwritten with other settings."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evocomp.log import UserError, logger

_held: dict[str, int] = {}  # folder -> descriptor; this process's own locks do not exclude one another


def hold(folder: Path) -> None:
    """Note that this process uses the store, until it ends; any number of processes may."""
    _lock(folder, fcntl.LOCK_SH)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Context in which no other process uses the store.

    Raises:
        UserError: another process does.
    """
    _lock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        _lock(folder, fcntl.LOCK_SH)


def _lock(folder: Path, kind: int) -> None:
    key = os.path.realpath(folder)
    try:
        if key not in _held or not _is_that_folder(_held[key], key):
            if key in _held:
                os.close(_held.pop(key))
            _held[key] = os.open(key, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(_held[key], kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is using label store {folder}; wait for it, or choose another folder (labels.dir)"
        ) from None
    except OSError:
        logger.debug("%s lies on a file system without locks", folder)


def _is_that_folder(descriptor: int, path: str) -> bool:
    """Whether the folder of an earlier lock is the one there now; it may have been deleted and made again."""
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
