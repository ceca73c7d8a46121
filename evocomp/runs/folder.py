"""The folder of a run: its lock and settings, whether the run is finished, and the checkpoint to resume from."""

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
    """Whether the folder holds this run, finished; see `look`. Rank 0 checks for all ranks; nothing is written."""
    return distributed.from_rank_0(lambda: look(config, folder))


@contextmanager
def claimed(config: RunConfig, folder: Path) -> Iterator[None]:
    """Create the folder, save the settings in it, and lock it while this process trains.

    Enter it after data and settings have been checked, so that an error leaves no folder behind.

    Raises:
        UserError: another process trains in the folder, or the folder cannot be written.
    """
    with ExitStack() as stack:
        distributed.from_rank_0(lambda: _claim(config, folder, stack))
        yield


def _claim(config: RunConfig, folder: Path, stack: ExitStack) -> None:
    """Lock the folder until `stack` is closed or the process exits; save the settings, or update those of `eval`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        _lock(descriptor, folder)
        if (folder / "config.yaml").exists():
            judge_as_asked(config, folder)
        else:
            _save(config, folder)
    except OSError as error:
        raise UserError(f"--run_dir={folder} cannot be written: {error.strerror}; choose another one") from None


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}; wait for it, or choose another --run_dir") from None
    except OSError:
        logger.debug("%s lies on a file system without locks", folder)


def judge_as_asked(config: RunConfig, folder: Path) -> bool:
    """Save the evaluation settings (`eval`) if they differ from those of the last start; returns whether they do.

    They do not affect training, so a run may be resumed with other ones.
    """
    there = config_files.load_saved(folder)
    if there.eval == config.eval:
        return False
    _save(replace(there, eval=config.eval), folder)
    logger.info("%s: the eval settings have changed since the last start; the new ones are used", folder)
    return True


def _save(config: RunConfig, folder: Path) -> None:
    temporary = folder / "config.tmp"
    config_files.save(config, temporary)
    temporary.replace(folder / "config.yaml")


def last_checkpoint(folder: Path) -> str | None:
    """Checkpoint to resume from, the same on all ranks: the last one, or an earlier one if that is unreadable."""
    last = folder / "checkpoints" / "last.ckpt"
    known = distributed.gather(last.exists())
    if any(known) and not all(known):
        raise UserError(
            f"only {sum(known)} of {len(known)} processes see {last}; put --run_dir on storage that all nodes share "
            "(labels may be on each node's own disk, with --labels.dir)"
        )
    return distributed.from_rank_0(lambda: _newest_whole(last)) if any(known) else None


def _newest_whole(last: Path) -> str:
    """The last checkpoint, or the newest other one that is readable."""
    before = (path for path in last.parent.glob("*.ckpt") if path != last)
    for path in (last, *sorted(before, key=lambda path: path.stat().st_mtime, reverse=True)):
        if _is_whole(path):
            if path != last:
                logger.warning("%s is unreadable; resuming from %s", last, path)
            return str(path)
    raise UserError(f"no checkpoint in {last.parent} is readable; restore one, or start again in another --run_dir")


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
