"""Lightning's reading and writing of checkpoints, safe against code in a file, a kill and a full disk."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from evocomp.files import is_full, whole_file
from evocomp.log import UserError
from evocomp.runs.checkpoints import DAMAGED, read_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, on the disk of the run; reads only tensors and plain values.

    Lightning's own writes into the folder for temporary files first, which may be another and smaller disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write the checkpoint. Raises `UserError` if the disk is full or the folder cannot be written."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        path = Path(path)
        try:
            path.parent.mkdir(exist_ok=True)
            with whole_file(path) as file:
                file.write(buffer.getbuffer())
        except OSError as error:
            what = "no space left" if is_full(error) else error.strerror
            raise UserError(
                f"checkpoint {path} cannot be written ({what}); what was saved before is kept: mend this and run the "
                "same command again"
            ) from None

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint in the memory of the CPU, whatever `weights_only` says. Raises `UserError` if it cannot be
        read."""
        try:
            return read_checkpoint(Path(path), "cpu")
        except DAMAGED as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {path} cannot be read ({reason}); restore it, or delete it") from None
