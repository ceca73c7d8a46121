"""Disk cache of the vision tower's output.

The cache holds the projector's input, not its output: for LLaVA-1.5 the output is four times as large.

    FOLDER/KEY/3f/3fa9....safetensors     one image, named by a hash of its pixels

KEY is a hash of the model and of everything else that the output depends on. An image read from the cache gives exactly
the same visual tokens as a newly encoded one, because the projector and the layers after it run in both cases.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.utils import ModelOutput

from evocomp.files import is_full, readable, sweep, write_whole
from evocomp.log import UserError, logger, warn_once
from evocomp.mllm import families

_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


class FeatureCache:
    """Encodes each image once for all processes and runs that share the folder.

    Several processes may read and write at the same time. When the disk is full, the cache stops writing and the run
    continues.

    Args:
        folder: cache folder, shared by all processes of a node or of a job.
        model: the MLLM.
        fingerprint: hash of its weights.

    Raises:
        UserError: the model reads several layers of its tower, or no folder can be made.
    """

    def __init__(self, folder: str | Path, model: nn.Module, fingerprint: str):
        if isinstance(getattr(model.config, "vision_feature_layer", None), list | tuple):
            raise UserError("model.feature_cache: this model reads several layers of its vision tower; leave it out")
        self.model = model
        tower = families.tower(model)
        device = next(tower.parameters())
        depends_on = (fingerprint, device.dtype, device.device.type, tower.config._attn_implementation)
        self.folder = Path(folder) / hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"model.feature_cache={folder}: cannot create the folder: {error.strerror}; choose another one"
            ) from None
        self._writes = True

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, ModelOutput]:
        """`families.encode` for one image; the tower does not run if its output is in the cache."""
        path = self._path(inputs)
        known = self._read(path)
        if known is not None:
            device = inputs["pixel_values"].device
            with self._in_place_of_tower({name: value.to(device) for name, value in known.items()}):
                return families.encode(self.model, inputs)
        with self._listening_to_tower() as heard:
            encoded = families.encode(self.model, inputs)
        if self._writes and len(heard) == 1:  # not cached: a tower that runs once per image
            self._write(path, heard[0])
        return encoded

    def reserve(self, pictures: int, free: int) -> None:
        """Log the disk space that the cache needs, estimated from the images that are cached already.

        Args:
            pictures: number of images that will be cached.
            free: free space of the disk [bytes].

        Raises:
            UserError: the disk has not enough free space.
        """
        sweep(self.folder.glob("*/*.tmp.*"))
        sizes = [path.stat().st_size for path in self.folder.glob("*/*.safetensors")]
        if not sizes:
            raise UserError(
                f"model.feature_cache: no image fits on the disk of {self.folder}; choose a folder on a larger disk"
            )
        per_image = sum(sizes) / len(sizes)
        missing = max(0, pictures - len(sizes)) * per_image
        logger.info(
            "feature cache: %s for %d images (%s each), %s of it already cached in %s, %s free",
            readable(pictures * per_image),
            pictures,
            readable(per_image),
            readable(sum(sizes)),
            self.folder,
            readable(free),
        )
        if missing > free:
            raise UserError(
                f"model.feature_cache: {self.folder} needs {readable(missing)} more, but only {readable(free)} are "
                "free; choose a folder on a larger disk, or leave it empty (encoding takes little of the time)"
            )

    # ------------------------------------------------------------ files

    def _path(self, inputs: Mapping[str, Tensor]) -> Path:
        digest = hashlib.sha256()
        for name in sorted(set(inputs) - set(_TEXT)):
            value = inputs[name].detach().cpu().contiguous()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        try:
            known = load(path.read_bytes())
            return {"features": known["features"], **known}
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError):
            logger.warning("%s is damaged; encoding the image again", path)
            return None

    def _write(self, path: Path, features: dict[str, Tensor]) -> None:
        try:
            write_whole(path, save({name: value.detach().cpu().contiguous() for name, value in features.items()}))
        except OSError as error:
            if not is_full(error):
                raise
            self._writes = False
            warn_once(f"the disk of the feature cache {self.folder} is full; no more images are cached")

    # ------------------------------------------------------------ the tower

    @contextmanager
    def _listening_to_tower(self) -> Iterator[list[dict[str, Tensor]]]:
        heard: list[dict[str, Tensor]] = []

        def listen(module: nn.Module, arguments: tuple, output: ModelOutput) -> None:
            read = {"features": families.read_of_tower(self.model, output)}
            if getattr(output, "deepstack_features", None) is not None:
                read["deepstack"] = torch.stack(list(output.deepstack_features))
            heard.append(read)

        hook = families.tower(self.model).register_forward_hook(listen)
        try:
            yield heard
        finally:
            hook.remove()

    @contextmanager
    def _in_place_of_tower(self, read: Mapping[str, Tensor]) -> Iterator[None]:
        tower = families.tower(self.model)
        tower.forward = lambda *_, **__: families.as_tower_output(read["features"], read.get("deepstack"))
        try:
            yield
        finally:
            del tower.forward
