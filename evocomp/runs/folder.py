"""The folder of a run: whose it is, whether its run is finished, and where to go on from."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from evocomp import distributed
from evocomp.config import load as config_files
from evocomp.config.schema import RunConfig
from evocomp.files import write_whole
from evocomp.log import UserError, logger
from evocomp.runs.checkpoints import DAMAGED, read_checkpoint
from evocomp.runs.claims import look


def is_finished(config: RunConfig, folder: Path) -> bool:
    """Whether this very run is finished there; refuses a folder of others. Rank 0 looks, for all; writes nothing."""
    return distributed.from_rank_0(lambda: look(config, folder))


@contextmanager
def claimed(config: RunConfig, folder: Path) -> Iterator[None]:
    """Make the folder this run's, and this process's while it trains: entered once data and settings have proved sound,
    so that mistakes leave nothing.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    with ExitStack() as stack:
        distributed.from_rank_0(lambda: _claim(config, folder, stack))
        yield


def _claim(config: RunConfig, folder: Path, stack: ExitStack) -> None:
    """Lock the folder until the stack is closed, or the process is gone, and see to its settings."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, place)
        _lock(place, folder)
        if (folder / "config.yaml").exists():
            judge_as_asked(config, folder)
        else:
            _save(config, folder)
    except OSError as error:
        raise UserError(f"--run_dir={folder} cannot be written: {error.strerror}; choose another one") from None


def _lock(place: int, folder: Path) -> None:
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}; wait for it, or choose another --run_dir") from None
    except OSError:
        logger.debug("%s lies on a file system without locks", folder)


def judge_as_asked(config: RunConfig, folder: Path) -> bool:
    """Keep settings of the judgement (`eval`) that are other than those of the last start; whether there were any.

    They change nothing of what is trained, so a run is not bound to those that it was begun with.
    """
    there = config_files.load_saved(folder)
    if there.eval == config.eval:
        return False
    _save(replace(there, eval=config.eval), folder)
    logger.info("%s is judged by the eval settings of this start; those of the last one were others", folder)
    return True


def _save(config: RunConfig, folder: Path) -> None:
    temporary = folder / "config.tmp"
    config_files.save(config, temporary)
    temporary.replace(folder / "config.yaml")


def last_checkpoint(folder: Path) -> str | None:
    """Where to go on from, the same on all ranks: the last checkpoint, or the one before if that is broken."""
    last = folder / "checkpoints" / "last.ckpt"
    known = distributed.gather(last.exists())
    if any(known) and not all(known):
        raise UserError(
            f"{last} is seen by {sum(known)} of {len(known)} processes: --run_dir must lie on storage that all nodes "
            "share (labels may lie on each node's own disk, with --labels.dir)"
        )
    return distributed.from_rank_0(lambda: _newest_whole(last)) if any(known) else None


def _newest_whole(last: Path) -> str:
    """The last checkpoint, or the newest beside it that opens."""
    before = (path for path in last.parent.glob("*.ckpt") if path != last)
    for path in (last, *sorted(before, key=lambda path: path.stat().st_mtime, reverse=True)):
        if _is_whole(path):
            if path != last:
                logger.warning("%s is not readable; going on from %s", last, path)
            return str(path)
    raise UserError(f"no checkpoint in {last.parent} is readable; restore one, or begin anew in another --run_dir")


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint opens; a file that was cut short does not. Raises `UserError` for one that needs code."""
    try:
        content = read_checkpoint(path)
    except DAMAGED:
        return False
    return "state_dict" in content and "loops" in content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
