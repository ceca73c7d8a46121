"""Reading checkpoints: only tensors and plain values, so that a file that somebody else made cannot run code."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from evocomp.log import UserError

DAMAGED = (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What `torch.load` raises for a file that is cut short, empty or no checkpoint."""


def read_checkpoint(path: Path, map_location: Any = None) -> dict[str, Any]:
    """The content of a checkpoint, with tensors mapped from the file.

    Raises:
        UserError: the file holds objects other than tensors and plain values, which could run code when loaded, or it
            is a folder.
        one of `DAMAGED`: it cannot be read as a checkpoint.
    """
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder; a checkpoint of a run is one file")
    try:
        content = torch.load(path, map_location=map_location, mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        if needs_code(error):
            raise UserError(
                f"checkpoint {path} holds more than tensors and plain values and is not loaded, because that could "
                "run code; delete it, or begin anew in another --run_dir"
            ) from None
        raise
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}")
    return content


def needs_code(error: pickle.UnpicklingError) -> bool:
    """Whether a file was refused because it names functions or classes, not because it is damaged."""
    text = str(error)
    return "GLOBAL" in text or "unrecognized function" in text or "can only build" in text.lower()
