"""Means over valid tokens, also if padding contains NaN."""

from torch import Tensor

from evocomp.ops.precision import compute_dtype


def clean(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """tensor in fp32 (or fp64) with zeros where `valid` is False."""
    tensor = tensor.to(compute_dtype(tensor))
    return tensor if valid is None else tensor.masked_fill(~valid, 0)


def mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid entries; 0 if there are none."""
    if valid is None:
        return values.mean()
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp_min(1)
