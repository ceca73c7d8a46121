"""Weights of a saved model are used only if they are all there, of the right shapes, and finite.

transformers initialises what a file lacks with random numbers and warns; a training that has diverged leaves NaN.
Either way tokens would be kept by chance.
"""

import logging
import pickle
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from evocomp.log import UserError


def has_finite_weights(module: nn.Module) -> bool:
    """Whether all weights are finite; of a sharded module, this process's part of them."""
    return all(
        bool(torch.isfinite(weight.to_local() if hasattr(weight, "to_local") else weight).all())
        for weight in module.state_dict().values()
        if weight.is_floating_point()
    )


def check_finite_weights(module: nn.Module, what: str, advice: str) -> None:
    """Raise UserError unless all weights are finite.

    Args:
        what: the module's name for the message.
        advice: what to do.
    """
    if not has_finite_weights(module):
        raise UserError(f"{what} has weights that are not finite (NaN or infinite): {advice}")


def load_complete(load: Callable[..., Any], what: str, may_have_more: bool = False, **options: Any) -> nn.Module:
    """The model of `load(..., output_loading_info=True)`, a `from_pretrained`, without code from its folder.

    Args:
        what: the model's name for the message.
        may_have_more: accept tensors that the model has no place for.

    Raises:
        UserError: tensors are missing, of other shapes, superfluous or not finite.
    """
    with _quiet():
        model, info = load(output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **options)
    mismatched = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    _refuse(what, "another shape than its configuration says for", mismatched)
    _refuse(what, "no values for", info["missing_keys"])
    if not may_have_more:
        _refuse(what, "no place for", info["unexpected_keys"])
    check_finite_weights(model, what, "copy or train it again")
    return model


def _refuse(what: str, fault: str, names: Collection[str]) -> None:
    if names:
        first, *others = sorted(map(str, names))
        more = f" and {len(others)} more" if others else ""
        raise UserError(f"{what} has {fault} the tensor {first}{more}; copy or train it again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of tensors that do not fit; it is told in one line."""
    reports = logging.getLogger("transformers")
    before = reports.level
    reports.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        reports.setLevel(before)


def reason(error: Exception) -> str:
    """What went wrong while a model was loaded, in one line."""
    if isinstance(error, pickle.UnpicklingError):
        return "its pickle holds more than tensors, or is damaged; give weights as safetensors"
    line = " ".join(str(error).strip().partition("\n")[0].split()).rstrip(".")[:300]
    if isinstance(error, OSError | ValueError | ImportError | SafetensorError) and line:
        return line
    return f"{type(error).__name__}: {line}"  # a configuration with fields of wrong types raises whatever it meets
