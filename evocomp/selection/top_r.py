"""Highest scores, without surprises: equal scores go to the lower index, results are in original order."""

import torch
from torch import Tensor


def descending(scores: Tensor) -> Tensor:
    """Indices [..., N] that sort `scores` [..., N] from high to low; among equals the lower comes first.

    `torch.topk` leaves the order of equal values to the backend, so it is not used anywhere in this room.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def top_r(scores: Tensor, r: int) -> Tensor:
    """The `r` highest of `scores` [..., N] as ascending indices [..., r], int64; each row by itself.

    >>> top_r(torch.tensor([0.1, 0.9, 0.5, 0.9]), 2).tolist()
    [1, 3]
    """
    assert 0 <= r <= scores.shape[-1], f"cannot take {r} of {scores.shape[-1]} scores"
    return descending(scores)[..., :r].sort(dim=-1).values
