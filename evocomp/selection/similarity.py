"""Cosine similarity in float32 whatever the input's precision, as every rival computes it."""

import torch.nn.functional as F
from torch import Tensor


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Cosines [N, M] of rows of `x` [N, D] with rows of `y` [M, D] (default `x`); 0 with a zero row."""
    x = F.normalize(x.float(), dim=-1)
    return x @ (x if y is None else F.normalize(y.float(), dim=-1)).T
