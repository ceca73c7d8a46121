"""Atomic file writes: a file is complete or absent, even if a process is killed while it writes."""

import errno
import itertools
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_numbers = itertools.count(1)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: it is complete or absent, even after a power failure.

    Several processes may write the same file at once: each writes a temporary file, syncs it to disk and renames it.
    The parent folder is created if it is missing, but not the folders above it.

    Raises:
        OSError: the file cannot be written; the temporary file is deleted.
    """
    with whole_file(path) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """`write_whole` for content that is written piece by piece: the file appears when the context is left without an
    error."""
    temporary = path.with_name(f"{path.name}.tmp.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}")
    try:
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            _sync(path.parent.parent)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_full(error: OSError) -> bool:
    """Whether the write failed because the disk, or this user's quota on it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sweep(temporaries: Iterable[Path]) -> None:
    """Delete temporary files (`*.tmp.*`) of killed processes; other processes may be writing at the same time."""
    for path in temporaries:
        name = re.fullmatch(r".+?\.tmp\.(.+)\.(\d{1,9})\.\d+", path.name)
        if name is None or not path.is_file():
            continue  # not written by `whole_file`
        host, pid = name.groups()
        # only a process of this host can be asked whether it lives; a day is longer than any write
        try:
            old = time.time() - path.stat().st_mtime > 86_400
        except FileNotFoundError:
            continue
        if old or (host == socket.gethostname() and not _alive(int(pid))):
            with suppress(OSError):  # on a read-only disk it does no harm
                path.unlink()


def readable(size: float) -> str:
    """A number of bytes as text with a decimal unit.

    >>> readable(1.18e11)
    '118 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _sync(folder: Path) -> None:
    """Sync the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
