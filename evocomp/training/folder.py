"""The folder of a run: whose it is, whether its run is finished, and where to go on from."""

import json
from pathlib import Path
from typing import Any

from evocomp import distributed
from evocomp.config import load as config_files
from evocomp.config.schema import RunConfig
from evocomp.log import UserError, is_rank_zero

DONE = "trained.json"


def is_finished(config: RunConfig, folder: Path) -> bool:
    """Whether this very run is finished there; refuses a folder of others. Rank 0 looks, for all; writes nothing."""
    answer: bool | UserError = False
    if distributed.rank() == 0:
        try:
            answer = _look(config, folder)
        except UserError as error:
            answer = error
    answer = distributed.broadcast(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def claim_folder(config: RunConfig, folder: Path) -> None:
    """Make the folder this run's: called once data and settings have proved sound, so that mistakes leave nothing."""
    if not is_rank_zero() or (folder / "config.yaml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "config.tmp"
    config_files.save(config, temporary)
    temporary.replace(folder / "config.yaml")


def last_checkpoint(folder: Path) -> str | None:
    """Where to go on from: the same on all ranks."""
    last = folder / "checkpoints" / "last.ckpt"
    known = distributed.gather(last.exists())
    if any(known) and not all(known):
        raise UserError(
            f"{last} is seen by {sum(known)} of {len(known)} processes: --run_dir must lie on storage that all nodes "
            "share (labels may lie on each node's own disk, with --labels.dir)"
        )
    return str(last) if any(known) else None


def _look(config: RunConfig, folder: Path) -> bool:
    mine = folder / "config.yaml"
    if mine.exists():
        there, wanted = (_comparable(c) for c in (config_files.load([mine]), config))
        differing = sorted(key for key in wanted if wanted[key] != there.get(key))
        if differing:
            key = differing[0]
            raise UserError(
                f"{folder} holds a run with other settings ({key}: {there.get(key)} there, {wanted[key]} asked for); "
                "choose another --run_dir"
            )
        return (folder / DONE).exists()
    if folder.is_file():
        raise UserError(f"--run_dir={folder} is a file; give a folder")
    if folder.exists() and any(entry.name not in ("labels", "tensorboard", "config.tmp") for entry in folder.iterdir()):
        raise UserError(f"--run_dir={folder} holds other files; choose a new or empty folder")
    return False


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Settings by dotted key, without those that may differ from one start of a run to the next."""
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
