"""lmms-eval's models with fewer visual tokens: `lmms_eval --model evocomp_hf --model_args pretrained=...,keep=192`.

lmms-eval finds them by the entry point `lmms_eval.models`. Each is a class of lmms-eval with four more arguments:

    compressor=FOLDER_OR_ID   a trained compressor, or
    method=NAME               a training-free selector of `evocomp.selection` whose inputs the model provides;
                              with neither, the model runs uncompressed, as the reference
    keep=N                    visual tokens kept per image, a number or a share
    layer=L                   decoder layer before which the other tokens are dropped

The classes of lmms-eval catch errors of `generate` and score an empty answer. Here such an error ends the run.
lmms-eval is not imported until one of the classes is used.
"""

import functools
import hashlib
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evocomp.inference.hooks import compress
from evocomp.log import UserError, logger
from evocomp.selection import selector

# our class -> the class of lmms-eval that it extends
STOCK = {
    "LlavaHf": "lmms_eval.models.simple.llava_hf.LlavaHf",
    "LlavaHfChat": "lmms_eval.models.chat.llava_hf.LlavaHf",
    "Qwen2_5_VL": "lmms_eval.models.simple.qwen2_5_vl.Qwen2_5_VL",
    "Qwen2_5_VLChat": "lmms_eval.models.chat.qwen2_5_vl.Qwen2_5_VL",
    "Huggingface": "lmms_eval.models.chat.huggingface.Huggingface",
}
# name for --model -> (class for simple tasks, class for chat tasks)
MODELS = {
    "evocomp_llava_hf": ("LlavaHf", "LlavaHfChat"),
    "evocomp_qwen2_5_vl": ("Qwen2_5_VL", "Qwen2_5_VLChat"),
    "evocomp_hf": (None, "Huggingface"),
}


class GenerationFailed(SystemExit):
    """`generate` raised an error. Not an `Exception`, because lmms-eval catches those and continues."""


class Compressed:
    """Mixin that compresses a model; it comes before a class of lmms-eval in the method resolution order."""

    def __init__(
        self,
        compressor: str | None = None,
        method: str | None = None,
        keep: int | float | str | None = None,
        layer: int | str | None = None,
        **stock: Any,
    ):
        if compressor and method:
            raise UserError("compressor= and method= exclude each other; give one")
        if not (compressor or method) and (keep is not None or layer is not None):
            raise UserError("keep= and layer= need compressor= or method=")
        if os.environ.get("WORLD_SIZE", "1") == "1":
            # lmms-eval's LlavaHf passes an empty device_map, which transformers 5 rejects
            stock.setdefault("device_map", stock.get("device", "cuda"))
        super().__init__(**stock)
        self._selector = _method(method) if method else compressor
        self._settings = {"keep": _number(keep), "layer": None if layer is None else int(layer)}
        self.handle = None
        self._attach()
        self.model.generate = _loud(self.model.generate)

    def _attach(self, restore_length: bool = False) -> None:
        if not self._selector:
            return
        if self.handle is not None:
            self.handle.remove()
        self.handle = compress(self.model, self._selector, **self._settings, restore_length=restore_length)
        logger.info("compressing to %s visual tokens before layer %d", self.handle.keep, self.handle.layer)

    def loglikelihood(self, requests: list) -> list:
        """As in the base class, with logits of the full prompt length, because the base class slices them by it."""
        self._attach(restore_length=True)
        try:
            return super().loglikelihood(requests)
        finally:
            self._attach()


def _method(name: str):
    """The name of a training-free selector, or for random tokens a function whose scores depend only on the image.

    Raises:
        UserError: the name is not in `SELECTORS`.
    """
    if name != "random_tokens":
        selector(name)
        return name

    def random_scores(visual: Tensor, text: Tensor, keep: int) -> Tensor:
        digest = hashlib.sha256(visual[:8].float().cpu().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.rand(len(visual), generator=generator)

    return random_scores


def _number(keep: int | float | str | None) -> int | float | None:
    """Convert `keep` to a number; lmms-eval passes some numbers as text."""
    if keep is None or isinstance(keep, int | float):
        return keep
    try:
        return float(keep) if "." in keep else int(keep)
    except ValueError:
        raise UserError(f"keep={keep}: give a number of tokens or a share") from None


def _loud(generate: Callable) -> Callable:
    @functools.wraps(generate)
    def loud(*args: Any, **kwargs: Any):
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            logger.exception("generate failed")
            raise GenerationFailed(f"evocomp: generate failed ({type(error).__name__}: {error})") from error

    return loud


def manifests() -> list:
    """The model manifests for the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    def path(name: str | None) -> str | None:
        return name and f"{__name__}.{name}"

    return [
        ModelManifest(model_id, simple_class_path=path(simple), chat_class_path=path(chat))
        for model_id, (simple, chat) in MODELS.items()
    ]


def __getattr__(name: str) -> type:
    """Create an extended class on first use."""
    if name not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, stock = STOCK[name].rpartition(".")
    base = getattr(importlib.import_module(module), stock)
    made = type(base)(name, (Compressed, base), {"__module__": __name__, "__doc__": base.__doc__})
    globals()[name] = made
    return made
