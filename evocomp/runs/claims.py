"""Check, by the settings alone, that a run does not overwrite another. Needs no torch, so errors come at once.

The run itself checks again, for all its processes (`evocomp.runs.folder`, `evocomp.labels.build`).
"""

import os
from pathlib import Path
from typing import Any

from evocomp.config import load as config_files
from evocomp.config.schema import RunConfig
from evocomp.labels.fingerprint import from_settings
from evocomp.labels.store import LabelStore
from evocomp.log import UserError, logger

DONE = "trained.json"


def check_before_work(config: RunConfig) -> None:
    """Raise `UserError` if the run folder or the label store was made with other settings.

    Does nothing in a job of several processes, where rank 0 checks for all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return
    if not look(config, Path(config.run_dir), quiet=True):
        check_labels(config)


def check_labels(config: RunConfig) -> None:
    """Raise `UserError` if the label store was made with other settings, as far as the settings alone show."""
    if not config.labels.overwrite:
        folder = Path(config.labels.dir) if config.labels.dir else Path(config.run_dir) / "labels"
        LabelStore.refuse_other(folder, from_settings(config))


def look(config: RunConfig, folder: Path, quiet: bool = False) -> bool:
    """Whether the folder holds this run, finished; raises `UserError` if the folder holds anything else.

    quiet: do not warn about trainer settings that differ from those of a finished run.
    """
    mine = folder / "config.yaml"
    if mine.exists():
        there, wanted = (_comparable(c) for c in (config_files.load_saved(folder), config))
        # what was left to the machine (auto) has been decided there
        differing = sorted(key for key in wanted if wanted[key] not in (there.get(key), "auto"))
        if differing:
            key = differing[0]
            raise UserError(
                f"{folder} holds a run with different settings: {key}={there.get(key)}, requested {wanted[key]}; "
                "choose another --run_dir"
            )
        finished = (folder / DONE).exists()
        if finished and not quiet:
            _warn_of_ignored_settings(config, config_files.load_saved(folder), folder)
        return finished
    if folder.is_file():
        raise UserError(f"--run_dir={folder} is a file; give a folder")
    if folder.exists() and any(entry.name not in ("labels", "tensorboard", "config.tmp") for entry in folder.iterdir()):
        raise UserError(f"--run_dir={folder} holds other files; choose a new or empty folder")
    return False


def _warn_of_ignored_settings(config: RunConfig, there: RunConfig, folder: Path) -> None:
    """Warn that a finished run is not trained again with the requested trainer settings."""
    asked, had = dict(config.trainer), dict(there.trainer)
    differing = [key for key in sorted(asked.keys() | had.keys()) if asked.get(key) != had.get(key)]
    if differing:
        what = ", ".join(f"{k}={had.get(k, 'default')}, requested {asked.get(k, 'default')}" for k in differing)
        logger.warning("%s was trained with other trainer settings (%s); for these set another --run_dir", folder, what)


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Settings by dotted key, without those that may change between starts of the same run."""
    flat: dict[str, Any] = {}

    def walk(tree: Any, prefix: str) -> None:
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                walk(value, f"{name}.")
            else:
                flat[name] = value

    walk(config_files.to_dict(config), "")
    changeable = ("scorer.", "run_dir", "threads", "logger", "labels.overwrite", "labels.dir", "eval.", "trainer.")
    changeable += ("model.shard", "model.feature_cache")
    return {key: value for key, value in flat.items() if not key.startswith(changeable)}
