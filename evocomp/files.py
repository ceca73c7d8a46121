"""Files that are there whole or not at all, whatever is killed and whenever."""

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
    """Write a file so that it is there whole or not at all, also after a power cut.

    Several processes may write it at once: temporary name, fsync, rename. Its folder is made if that alone is missing.

    Raises:
        OSError: it cannot be written; nothing is left behind.
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
    """Whether the disk, or this user's share of it, had no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sweep(temporaries: Iterable[Path]) -> None:
    """Delete what killed writers left behind (`*.tmp.*`); others may be writing at this moment."""
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
    """A number of bytes for people.

    >>> readable(1.18e11)
    '118 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _sync(folder: Path) -> None:
    """Put the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot do this for folders
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
