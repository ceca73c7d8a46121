"""Deterministic top-r: ties go to the lower index, and results are in original order."""

import torch
from torch import Tensor


def descending(scores: Tensor) -> Tensor:
    """Indices [..., N] that sort `scores` [..., N] in descending order; ties are in order of index.

    `torch.topk` leaves the order of equal values to the backend, so this package does not use it.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def top_r(scores: Tensor, r: int) -> Tensor:
    """Ascending indices [..., r] of the `r` highest of `scores` [..., N], int64, for each row.

    >>> top_r(torch.tensor([0.1, 0.9, 0.5, 0.9]), 2).tolist()
    [1, 3]
    """
    assert 0 <= r <= scores.shape[-1], f"cannot take {r} of {scores.shape[-1]} scores"
    return descending(scores)[..., :r].sort(dim=-1).values
